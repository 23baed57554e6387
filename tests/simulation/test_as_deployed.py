"""A simulated run beside a real one, and beside the arithmetic."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import fluffle
from examples.numpy_regression import task
from fluffle.simulation.devices import Device
from fluffle_coordinator.storage.history import read_history_lines
from fluffle_worker.task import TaskOptions
from tests.simulation.test_simulation import Adder

CLIENTS, ROUNDS = 5, 4


class InOrder:
    """Trains as a task does, and takes as many steps of its device as its place in the order is."""

    def __init__(self, name: str, number: int, orders: list[list[str]]) -> None:
        self._task = task(TaskOptions(data=f"shard:{number}/{CLIENTS}", worker=""))
        self._name, self._orders = name, orders
        self.num_examples = self._task.num_examples

    def init(self, seed: int) -> Any:
        return self._task.init(seed)

    def evaluate(self, weights: Any) -> Any:
        return self._task.evaluate(weights)

    def train(self, weights: Any, plan: Any, progress: Any) -> Any:
        done = self._task.train(weights, plan, lambda *_: None)
        if self._orders:
            place = 1 + self._orders[plan.round - 1].index(self._name)
            progress(place, place, None)
        return done


def tasks(orders: list[list[str]]) -> dict[str, InOrder]:
    names = [f"client-{number}" for number in range(CLIENTS)]
    return {name: InOrder(name, number, orders) for number, name in enumerate(names)}


@pytest.mark.rabbit
def test_the_same_order_gives_the_same_bits_as_over_rabbitmq(rabbit_url):
    options: dict[str, Any] = {
        "rounds": ROUNDS,
        "seed": 7,
        "config": {"learning_rate": 0.3},
        "strategy": "fedadam",
    }
    real = fluffle.run(tasks([]), url=rabbit_url, federation="asdeployed", **options)
    # Which update comes first is up to the broker, and the sum is in the order of arrival.
    orders = [list(one.participants) for one in real.history]
    assert [sorted(order) for order in orders] == [sorted(tasks([]))] * ROUNDS
    simulated = fluffle.simulate(tasks(orders), step_s=1.0, **options)
    assert [list(one.participants) for one in simulated.history] == orders
    assert simulated.weights.keys() == real.weights.keys()
    for name, tensor in real.weights.items():
        assert simulated.weights[name].tobytes() == tensor.tobytes(), name
    for mine, theirs in zip(simulated.history, real.history, strict=True):
        assert mine.loss == pytest.approx(theirs.loss)  # summed as the evaluations came


CLASSES_S = [105.0, 205.0, 405.0]  # of 100, 200 and 400 s of training, and 5 s besides
DEVICES = 16


def updates_a_second(folder: Path, **options: Any) -> float:
    """Return how many updates are counted in a second of the simulation."""
    fluffle.simulate(
        [Adder(1.0) for _ in range(DEVICES)],
        owned=[Device(CLASSES_S[number % 3] / 4 - 1.25, 5.0) for number in range(DEVICES)],
        folder=folder,
        **options,
    )
    lines = [line for line in read_history_lines(folder) if line["event"] == "committed"]
    first, last = (datetime.fromisoformat(lines[at]["committed_at"]) for at in (0, -1))
    counted = sum(len(line["participants"]) for line in lines[1:])
    return counted / (last - first).total_seconds()


def test_what_asynchrony_gains_with_devices_of_three_classes_is_what_arithmetic_says(tmp_path):
    synchronous = updates_a_second(tmp_path / "rounds", rounds=10)
    asynchronous = updates_a_second(
        tmp_path / "buffered", schedule="buffered", buffer=8, rounds=100
    )
    # In rounds, each device makes one update in the time of the slowest; else in its own.
    expected = sum(max(CLASSES_S) / CLASSES_S[number % 3] for number in range(DEVICES)) / DEVICES
    assert synchronous == pytest.approx(DEVICES / max(CLASSES_S), rel=0.01)
    assert asynchronous / synchronous == pytest.approx(expected, rel=0.05)
