"""The models that a Flower client trains, as lists of arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.arrays import Array, Perturbation, make_weights
from benchmarks.round_gate import Gate


class Model(Protocol):
    """A model with its training data."""

    num_examples: int

    def first(self) -> list[Array]:
        """Return the first weights."""

    def train(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """Return the weights trained from ``arrays`` in round ``number``."""

    def evaluate(self, arrays: Sequence[Array]) -> tuple[float, int, dict[str, float]]:
        """Return the loss, the number of examples and the metrics."""


class Noop:
    """Like ``benchmarks.noop``: adds noise, and evaluates every model alike."""

    def __init__(self, size_bytes: int, seed: int) -> None:
        self.num_examples = 100 + seed
        self._size_bytes, self._perturb = size_bytes, Perturbation(seed)

    def first(self) -> list[Array]:
        """Return random weights."""
        return list(make_weights(self._size_bytes).values())

    def train(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """Return perturbed weights."""
        return list(self._perturb({str(at): array for at, array in enumerate(arrays)}).values())

    def evaluate(self, arrays: Sequence[Array]) -> tuple[float, int, dict[str, float]]:
        """Return a fixed evaluation."""
        return 1.0, 1, {}


class Letters:
    """The task of fluffle's workers: the same code, data and compiled step."""

    def __init__(self, data: str) -> None:
        from fluffle_worker.letters.task import task
        from fluffle_worker.task import TaskOptions

        self._task = task(TaskOptions(data, Path(data).name))
        self._names = list(self._task.init(0))
        self.num_examples = self._task.num_examples

    def first(self) -> list[Array]:
        """Return the task's initial weights."""
        return list(self._task.init(0).values())

    def train(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """Train with the default plan."""
        from fluffle_common.protocol.messages import Plan

        trained = self._task.train(self._named(arrays), Plan(seed=number), lambda *_: None)
        return [trained.weights[name] for name in self._names]

    def evaluate(self, arrays: Sequence[Array]) -> tuple[float, int, dict[str, float]]:
        """Evaluate on the held-out letters."""
        result = self._task.evaluate(self._named(arrays))
        assert result is not None
        return result.loss, result.num_examples, dict(result.metrics)

    def _named(self, arrays: Sequence[Array]) -> dict[str, Array]:
        return dict(zip(self._names, arrays, strict=True))


def make(config: dict[str, Any]) -> Model:
    """Return a letters model if ``data`` is set, else a no-op model of ``size`` bytes."""
    if config.get("data"):
        if config.get("plain"):
            from benchmarks.flower_side.letters import PlainLetters

            return PlainLetters(config["data"])
        return Letters(config["data"])
    return Noop(int(config["size"]), int(config.get("seed", 0)))


class Rounds:
    """The server's gate before each round and its time stamps after each.

    Args:
        gate: the benchmark's socket; None or empty for no gate.
        stamps: the file to which each round appends a line: its monotonic time and the process id.
    """

    def __init__(self, gate: str | None, stamps: str) -> None:
        self._gate = Gate(gate) if gate else None
        self._stamps = stamps

    def begin(self) -> None:
        """Wait at the gate."""
        if self._gate is not None:
            self._gate.enter()

    def committed(self, moment: float) -> None:
        """Append the time at which the round was averaged."""
        with Path(self._stamps).open("a") as stamps:
            stamps.write(f"{moment:.6f} {os.getpid()}\n")
