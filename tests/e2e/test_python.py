"""``fluffle.run`` over RabbitMQ, one file that describes a federation, and the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fluffle
from examples.numpy_regression import task
from fluffle_worker.task import TaskOptions
from tests.e2e.programs import ROOT, Federation
from tests.federation.test_local import federated_averaging

HOOKS = """
import numpy as np

def evaluate(weights):
    return {"slope": weights["slopes"][0]}

def on_round(commit):
    return "steep enough" if commit.round == 2 and commit.test["slope"] > 1 else None
"""


def shard(number: int):
    return task(TaskOptions(data=f"shard:{number}/3", worker=""))


@pytest.mark.rabbit
def test_one_argument_takes_a_run_to_rabbitmq(federation: Federation, tmp_path: Path) -> None:
    tasks = {f"worker-{number}": shard(number) for number in range(3)}
    arguments = {"rounds": 3, "config": {"learning_rate": 0.3}, "seed": 5}
    here = fluffle.run(tasks, **arguments)
    there = fluffle.run(tasks, **arguments, url=federation.url, federation=federation.name)
    for run in (here, there):
        # Which update comes first is up to the broker, and the sum is in the order of arrival.
        orders = [list(one.participants) for one in run.history]
        expected = federated_averaging(tasks, orders, 5, config=arguments["config"])
        for name, tensor in expected.items():
            assert run.weights[name].tobytes() == tensor.tobytes()


@pytest.mark.rabbit
def test_workers_of_other_processes_take_part(federation: Federation) -> None:
    workers = [federation.worker(f"shard:{number}/3") for number in (1, 2)]
    run = fluffle.run(
        {"mine": shard(0)},
        rounds=2,
        min_workers=3,
        url=federation.url,
        federation=federation.name,
        folder=federation.run,
    )
    assert [worker.end() for worker in workers] == [0, 0]
    assert [len(one.participants) for one in run.history] == [3, 3]


@pytest.mark.rabbit
def test_a_broker_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(fluffle.BrokerError, match=r"127\.0\.0\.1:9"):
        fluffle.run(url="amqp://127.0.0.1:9/", quorum=1, wait_broker=0.1)


@pytest.mark.rabbit
def test_one_file_describes_a_federation(federation: Federation, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks.py"
    hooks.write_text(HOOKS)
    file = tmp_path / "federation.toml"
    file.write_text(
        f'quorum = 3\nrounds = 1\nevaluate = "{hooks}:evaluate"\non-round = "{hooks}:on_round"\n'
        'monitor = "test/slope"\n'
        "[config]\nlearning_rate = 0.3\n"
    )
    coordinator = federation.coordinator(file, "--rounds", 6)
    workers = [federation.worker(f"shard:{number}/3") for number in range(3)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0, 0]
    run = fluffle.Run(federation.run)
    assert run.reason == "steep enough"
    slopes = [one.weights["slopes"][0] for one in run.history]
    assert run.history["test/slope"] == slopes
    assert len(slopes) == 2
    assert fluffle.load_model(federation.run / "best.safetensors")["slopes"][0] == max(slopes)


SCRIPT = """
import fluffle
import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()

class Nearest:
    '''The mean image of every digit.'''
    def __init__(self, part):
        self.inputs, self.targets = digits.data[part::3], digits.target[part::3]
        self.num_examples = len(self.inputs)
    def init(self, seed):
        return {"means": np.zeros((10, 64))}
    def train(self, weights, plan, progress):
        means = [self.inputs[self.targets == digit].mean(axis=0) for digit in range(10)]
        return fluffle.TrainResult({"means": np.stack(means)}, self.num_examples)
    def evaluate(self, weights):
        distance = ((self.inputs[:, None] - weights["means"]) ** 2).sum(axis=2)
        right = float((distance.argmin(axis=1) == self.targets).mean())
        return fluffle.EvalResult(1 - right, self.num_examples, {"accuracy": right})

run = fluffle.run([Nearest(part) for part in range(3)], rounds=2)
assert run.history["accuracy"][-1] > 0.85, run
print(fluffle.__file__)
"""


def test_the_wheel_has_all_that_is_needed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(unpacked)
    for package in ("fluffle", *(f"fluffle_{x}" for x in ("common", "coordinator", "worker"))):
        assert f"{package}/py.typed" in names
    sources = [path for path in ROOT.glob("*/fluffle*/**/*") if path.suffix in _SHIPPED]
    sources += ROOT.glob("fluffle/*.py")
    assert len(sources) > 150
    for path in sources:
        base = ROOT if path.is_relative_to(ROOT / "fluffle") else ROOT / path.parts[len(ROOT.parts)]
        assert str(path.relative_to(base)) in names
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.strip() == str(unpacked / "fluffle/__init__.py")


_SHIPPED = {".py", ".html", ".css", ".js", ".svg"}
