"""The command line: help that teaches, and wrong use that is told in one line."""

from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import here

COMMANDS = sorted({point.name for point in entry_points(group="fluffle.commands")})


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["broker", "up"]])
def test_help(command: list[str]) -> None:
    code, told, errors = here.fluffle(*command, "--help")
    assert (code, errors) == (0, "")
    assert "Usage: fluffle" in told
    assert len(told.splitlines()) > 5


@pytest.mark.parametrize("command", [[], ["broker"]])
def test_a_command_without_arguments_shows_its_help(command: list[str]) -> None:
    _, told, _ = here.fluffle(*command, "--help")
    assert here.fluffle(*command) == (2, "", told)


@pytest.fixture
def _files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "plain.py").write_text("x = 1\n")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"w": np.zeros(3)}, tmp_path / "other.safetensors", metadata={"task": "other"})


W = ["worker", "--federation", "f", "--data", "empty"]
C = ["coordinator", "--federation", "f"]


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["wroker"], "did you mean 'worker'"),
        (["borker"], "did you mean 'broker'"),
        (["history"], "fluffle history needs RUN; see 'fluffle history --help'"),
        (["plot", "letters", "--out", "x.png"], "there is no run folder 'letters'; give one such"),
        (["report", "letters"], "there is no run folder 'letters'"),
        ([*C, "--quorom", "2"], "--quorum"),
        ([*C, "--quorum", "0"], "invalid quorum"),
        ([*C, "--quorum", "1.5"], "invalid quorum"),
        ([*C, "--url", "http://x"], "is not the URL of a broker"),
        (["coordinator", "--federation", "a.b"], "is not a valid federation name"),
        (["coordinator", "--federation", "_a"], "and begin with a letter or digit"),
        (["coordinator", "--federation", "amq"], "RabbitMQ reserves the name 'amq'"),
        (["worker", "--federation", "f", "--data", "/"], "no worker ID can be derived from"),
        ([*W, "--id", ".a"], "begin with a letter or digit"),
        (["tap", "--federation", "f", "--worker", ".a"], "not a valid worker ID; use at most 64"),
        ([*C, "--init", "missing.safetensors"], "there is no model file"),
        ([*C, "--config", "x"], "KEY=VALUE"),
        (W, "has no images"),
        ([*W, "--task", "nowhere:task"], "there is no module nowhere"),
        ([*W, "--task", "nowhere.py:task"], "there is no file nowhere.py"),
        ([*W, "--task", "plain.py:task"], "plain.py has no 'task'"),
        ([*W, "--task", "broken.py:task"], "no_such_package"),
        ([*W, "--task", "task"], "module:name"),
        (["worker", "--federation", "f", "--data", "nowhere"], "there is no folder"),
        (["predict", "--model", "no.safetensors", "--image", "x.png"], "there is no model file"),
        (["predict", "--model", "half.safetensors", "--image", "x"], "in the safetensors format"),
        (
            ["predict", "--model", "other.safetensors", "--image", "x"],
            "not a model of the letters task",
        ),
        (
            ["confusion", "--model", "other.safetensors", "--data", "empty", "--out", "c.png"],
            "not a model of the letters task",
        ),
        (["history", "empty"], "no history"),
        (["plot", "empty", "--out", "x.png"], "no history"),
        (["queues", "--federation", "f", "--url", "amqp://127.0.0.1:9"], "no broker at"),
        (["queues", "--federation", "f", "--url", "nonsense"], "is not the URL of a broker"),
        ([*C, "--url", "amqp://127.0.0.1:9", "--wait-broker", "0.1"], "no broker at"),
    ],
)
def test_wrong_use_is_told_in_one_line(words: list[str], told: str) -> None:
    code, shown, errors = here.fluffle(*words)
    assert code not in (0, 1)
    (line,) = errors.strip().splitlines()
    assert line.startswith("fluffle: ")
    assert told in line
    assert "Traceback" not in shown
