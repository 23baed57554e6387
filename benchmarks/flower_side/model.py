"""The model and the training of a Flower client, as lists of arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.arrays import Array, Perturbation, make_weights
from benchmarks.gate import Gate


class Model(Protocol):
    """What a client trains."""

    num_examples: int

    def first(self) -> list[Array]:
        """Make the first weights."""

    def train(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """Train the weights of a round."""

    def evaluate(self, arrays: Sequence[Array]) -> tuple[float, int, dict[str, float]]:
        """Return loss, number of examples and metrics."""


class Noop:
    """As fluffle's: adds noise, and finds every model as good as the last."""

    def __init__(self, size_bytes: int, seed: int) -> None:
        self.num_examples = 100 + seed
        self._size_bytes, self._perturb = size_bytes, Perturbation(seed)

    def first(self) -> list[Array]:
        """See ``Model``."""
        return list(make_weights(self._size_bytes).values())

    def train(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """See ``Model``."""
        return list(self._perturb({str(at): array for at, array in enumerate(arrays)}).values())

    def evaluate(self, arrays: Sequence[Array]) -> tuple[float, int, dict[str, float]]:
        """See ``Model``."""
        return 1.0, 1, {}


class Letters:
    """The very task that fluffle's workers train: the same code, data and compiled step."""

    def __init__(self, data: str) -> None:
        from fluffle_worker.letters.task import task
        from fluffle_worker.task import TaskOptions

        self._task = task(TaskOptions(data, Path(data).name))
        self._names = list(self._task.init(0))
        self.num_examples = self._task.num_examples

    def first(self) -> list[Array]:
        """See ``Model``."""
        return list(self._task.init(0).values())

    def train(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """See ``Model``."""
        from fluffle_common.protocol.messages import Plan

        trained = self._task.train(self._named(arrays), Plan(seed=number), lambda *_: None)
        return [trained.weights[name] for name in self._names]

    def evaluate(self, arrays: Sequence[Array]) -> tuple[float, int, dict[str, float]]:
        """See ``Model``."""
        found = self._task.evaluate(self._named(arrays))
        assert found is not None
        return found.loss, found.num_examples, dict(found.metrics)

    def _named(self, arrays: Sequence[Array]) -> dict[str, Array]:
        return dict(zip(self._names, arrays, strict=True))


def make(told: dict[str, Any]) -> Model:
    """Make the model that ``data`` names, else one of ``size`` bytes that learns nothing."""
    if told.get("data"):
        if told.get("plain"):
            from benchmarks.flower_side.letters import PlainLetters

            return PlainLetters(told["data"])
        return Letters(told["data"])
    return Noop(int(told["size"]), int(told.get("seed", 0)))


class Rounds:
    """What the server's side does around each round: waits at the gate, and notes its end.

    Args:
        gate: the benchmark's socket; none where nobody holds the rounds back.
        stamps: the file that gets a line with the monotonic time when a round has been averaged.
    """

    def __init__(self, gate: str | None, stamps: str) -> None:
        self._gate = Gate(gate) if gate else None
        self._stamps = stamps

    def begin(self) -> None:
        """Wait until the next round may begin."""
        if self._gate is not None:
            self._gate.enter()

    def committed(self, moment: float) -> None:
        """Note that the round has been averaged."""
        with Path(self._stamps).open("a") as stamps:
            stamps.write(f"{moment:.6f} {os.getpid()}\n")
