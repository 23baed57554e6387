"""Signals and exit codes of a running program."""

from __future__ import annotations

import asyncio
import inspect
import os
import platform
import resource
import signal
import subprocess
import sys

import pytest

from fluffle_common.cli import app
from fluffle_common.cli.exit_now import Interrupted
from fluffle_common.cli.runtime import run_until_signalled
from fluffle_common.errors import RunError, TaskError
from fluffle_coordinator.user_code.calls import call_guarded
from tests.processes import press_ctrl_c_until_it_ends, wait_until_computed

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _as_before():
    before = {each: signal.getsignal(each) for each in ENDING}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


async def hit(number: signal.Signals, patience_s: float) -> str:
    os.kill(os.getpid(), number)
    await asyncio.sleep(patience_s)
    return "went on"


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_program_with_the_usual_exit_code(number):
    with pytest.raises(Interrupted) as caught:
        run_until_signalled(hit(number, 30.0))
    assert caught.value.exit_code == 128 + number


def test_too_few_open_files_are_refused_before_the_loop_runs():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    main = hit(signal.SIGINT, 0.0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, limits[1]))
    try:
        with pytest.raises(RunError, match=r"limit of 12 open files .*ulimit -n"):
            run_until_signalled(main)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert inspect.getcoroutinestate(main) == inspect.CORO_CLOSED


def test_under_nohup_sighup_is_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_until_signalled(hit(signal.SIGHUP, 0.1)) == "went on"


def test_a_keyboard_interrupt_without_a_signal_is_an_error_of_the_user_s_code():
    def fail():
        raise KeyboardInterrupt

    async def run():
        call_guarded("schedule s.py:s", "may_close()", fail)

    with pytest.raises(KeyboardInterrupt):  # before the loop runs, it may be Ctrl-C
        call_guarded("schedule s.py:s", "max_staleness", fail)
    with pytest.raises(TaskError, match="s.py:s failed in may_close.*KeyboardInterrupt"):
        run_until_signalled(run())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc_info")
def test_all_threads_allocate_from_one_arena():
    program = """
import asyncio, ctypes
from fluffle_common.cli.runtime import run_until_signalled
run_until_signalled(asyncio.to_thread(bytearray, 100_000))
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.count(b"<heap nr=") == 1


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_standard_stream_that_a_task_has_closed_ends_no_process(closed):
    program = f"""
import asyncio, os
from fluffle_common.cli.runtime import run_until_signalled
for descriptor in {closed}:
    os.close(descriptor)
run_until_signalled(asyncio.sleep(0))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("leave", "named"),
    [
        ("threading.Thread(target=time.sleep, args=(99,), name='prefetch').start()", "prefetch"),
        ("concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 99)", "ThreadPoolExecutor-"),
        ("fork.Process(target=time.sleep, args=(99,)).start()", "process "),
        ("atexit.register(time.sleep, 99)", "an atexit function"),
    ],
)
def test_what_a_task_leaves_running_delays_an_exit_only_for_a_while(leave, named):
    program = f"""
import atexit, concurrent.futures, multiprocessing, threading, time
from fluffle_common.cli.exit_now import exit_soon
fork = multiprocessing.get_context("fork")
{leave}
exit_soon(5, patience_s=0.2)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=60, check=False, capture_output=True, text=True
    )
    assert done.returncode == 5
    assert done.stderr.startswith("fluffle: exiting although code outside fluffle is still running")
    assert f"({named}" in done.stderr.replace("(thread ", "(")
    assert len(done.stderr.splitlines()) == 1


def test_signals_after_the_run_are_handled_as_before():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_until_signalled(asyncio.sleep(0))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_second_ctrl_c_ends_a_program_whose_task_is_in_c_code_while_it_loads(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import hashlib\n"
        "def task(options):\n"
        "    print('loading', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    program = "from fluffle_common.cli.app import main; main()"
    options = ["--federation", "f", "--data", "shard:1", "--task", "slow.py:task"]
    with subprocess.Popen(
        [sys.executable, "-c", program, "worker", *options], stdout=subprocess.PIPE, cwd=tmp_path
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"loading\n"
        try:
            wait_until_computed(worker.pid, 0.2)
            assert press_ctrl_c_until_it_ends(worker) == -signal.SIGINT
        finally:
            worker.kill()


def test_a_program_that_a_signal_ended_exits_with_128_and_its_number(monkeypatch):
    def run(**_: object) -> int:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(app.fluffle, "main", run)
    assert app._exit_code() == 128 + signal.SIGTERM
