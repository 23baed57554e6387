"""The demo around its commands: what ends it, what it leaves behind, where it sends people."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for every command: notes that it was called, and does what the test's file `NAME` says.
STUB = """\
#!/bin/sh
name=$1
case "$*" in *client-*) for name; do :; done; name=${name##*/};; esac
echo "$name $*" >> calls
echo "$$" >> pids
case $name in
    broker) mkdir -p "$FLUFFLE_STATE";;
    letters) mkdir -p "$2/client-1/a" "$2/client-2/a" "$2/client-3/a" "$2/writer-4/a"
             touch "$2/writer-4/a/0000.png";;
    coordinator) mkdir -p runs/demo; test -f earlier || : > runs/demo/round-0001.safetensors;;
esac
test -f "$name" && . "./$name"
echo "done with $name"
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "fluffle"
    path.write_text(STUB)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _start(stub: Path, **env: str) -> subprocess.Popen[str]:
    code = f"import examples.demo as demo, sys; demo.FLUFFLE = {str(stub)!r}; sys.exit(demo.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=stub.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _calls(stub: Path) -> list[str]:
    return (stub.parent / "calls").read_text().splitlines()


def _assert_nothing_is_left(stub: Path) -> None:
    for pid in (stub.parent / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_it_says_what_was_measured_on_what_and_scores_a_writer_that_no_client_has(stub):
    demo = _start(stub, FLUFFLE_URL="amqp://elsewhere", FLUFFLE_STATE="mine")
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    calls = [line.split(" ", 1)[1] for line in _calls(stub)]
    assert sorted(line for line in calls if line.startswith("worker")) == [
        f"worker --federation demo --data data/client-{number}" for number in (1, 2, 3)
    ]
    (scored,) = [line for line in calls if line.startswith("confusion")]
    assert "--data data/writer-4 --unseen" in scored
    (named,) = [line for line in calls if line.startswith("predict")]
    assert "data/writer-4/a/0000.png" in named
    assert "held out a tenth" in " ".join(output.split())
    assert "how well the model reads an unknown writer" in " ".join(output.split())
    assert "by the temperature calibrates" in " ".join(output.split())
    assert "first run 'export FLUFFLE_STATE=.fluffle/demo'" in " ".join(output.split())
    assert "Traceback" not in output
    assert (stub.parent / "runs/demo-logs/client-2.log").read_text() == "done with client-2\n"


def test_a_second_time_uses_the_letters_of_the_first(stub):
    for _ in range(2):
        demo = _start(stub)
        output, _ = demo.communicate(timeout=60)
        assert demo.returncode == 0, output
    assert sum(line.startswith("letters ") for line in _calls(stub)) == 1


@pytest.mark.parametrize("commits", [True, False])
def test_the_queues_are_shown_after_the_first_round_of_this_run(stub, commits):
    file = stub.parent / "runs/demo/round-0001.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (0, 0))  # of an earlier run
    if not commits:
        (stub.parent / "earlier").touch()
    shown = "until grep -q '^queues ' calls; do sleep 0.05; done"
    (stub.parent / "coordinator").write_text(shown if commits else "sleep 1")
    demo = _start(stub)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    assert any(line.startswith("queues ") for line in _calls(stub)) == commits


def test_a_blank_line_of_a_program_is_not_shown(stub):
    (stub.parent / "client-2").write_text("echo; echo; echo left")
    demo = _start(stub)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    shown = [line.split() for line in output.splitlines() if line.startswith("client-2")]
    assert shown == [["client-2", "left"], ["client-2", "done", "with", "client-2"]]
    log = (stub.parent / "runs/demo-logs/client-2.log").read_text()
    assert log == "\n\nleft\ndone with client-2\n"


def test_other_things_in_the_folder_of_the_letters_are_no_dead_end(stub):
    (stub.parent / "data/client-1").mkdir(parents=True)
    for _ in range(2):
        demo = _start(stub)
        output, _ = demo.communicate(timeout=60)
        assert demo.returncode == 0, output
        assert "data/ has other content, so the letters go into runs/demo-data/" in output
    assert any("--data runs/demo-data/client-1" in line for line in _calls(stub))
    assert sum(line.startswith("letters ") for line in _calls(stub)) == 1


@pytest.mark.parametrize(
    ("ending", "code", "reason"), [("exit 5", 5, "exit code 5"), ("kill -9 $$", 1, "SIGKILL")]
)
def test_a_part_that_fails_ends_it_with_its_code_and_names_the_log(stub, ending, code, reason):
    for name in ("coordinator", "client-1", "client-3"):
        (stub.parent / name).write_text("exec sleep 600")
    (stub.parent / "client-2").write_text(f"echo no such data; {ending}")
    demo = _start(stub)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == code
    text = " ".join(output.split())
    assert f"client-2 ended with {reason}; see runs/demo-logs/client-2.log" in text
    assert "no such data" in (stub.parent / "runs/demo-logs/client-2.log").read_text()
    assert "Traceback" not in output
    _assert_nothing_is_left(stub)


def test_a_command_that_fails_ends_it_with_its_code(stub):
    (stub.parent / "broker").write_text("echo no RabbitMQ here; exit 3")
    demo = _start(stub)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 3
    assert "'fluffle broker up --port 0' ended with exit code 3; see its" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGINT, "client-2"),
        (signal.SIGINT, "letters"),
        (signal.SIGTERM, "client-2"),
        (signal.SIGHUP, "client-2"),
    ],
)
def test_a_signal_ends_everything(stub, number, where):
    for name in {"coordinator", "client-1", where}:
        (stub.parent / name).write_text("touch there; exec sleep 600")
    demo = _start(stub)
    assert demo.stdout is not None
    until = time.monotonic() + 60
    while not (stub.parent / "calls").exists() or not any(
        line.startswith(f"{where} ") for line in _calls(stub)
    ):
        assert time.monotonic() < until
        time.sleep(0.02)
    demo.send_signal(number)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 128 + number
    assert "stopping everything" in output
    assert _calls(stub)[-1] == "broker broker down"
    assert "Traceback" not in output
    _assert_nothing_is_left(stub)


def test_a_second_demo_in_the_same_folder_leaves_the_first_alone(stub):
    for name in ("coordinator", "client-1"):
        (stub.parent / name).write_text("touch there; exec sleep 600")
    first = _start(stub)
    until = time.monotonic() + 60
    while not (stub.parent / "there").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    before = len([line for line in _calls(stub) if line.startswith("broker")])
    second = _start(stub)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "another demo is running in this folder" in " ".join(output.split())
    assert len([line for line in _calls(stub) if line.startswith("broker")]) == before
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)


def test_nobody_who_reads_is_no_reason_to_end(stub):
    demo = _start(stub)
    assert demo.stdout is not None
    demo.stdout.close()
    assert demo.wait(60) == 0
    assert any(line.startswith("confusion ") for line in _calls(stub))
