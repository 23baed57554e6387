"""Strategies put together: transforms of a contribution, one mean, and a server step.

::

    contribution ──transforms──> mean ──mean delta──> server ──> the next weights

Each is a small object; a new one needs none of the others. The mean delta is a pseudo-gradient, so
that a server step is an ordinary optimizer (Reddi et al., "Adaptive Federated Optimization", ICLR
2021, section 2).

Example:
    >>> import numpy as np
    >>> from fluffle_coordinator.strategy.weighted import weighted
    >>> def halved(one: Contribution) -> Contribution:
    ...     delta = {name: values / 2 for name, values in one.delta.items()}
    ...     return dataclasses.replace(one, delta=delta)
    >>> strategy = pipeline(halved, mean=weighted(), server=replace())
    >>> base = {"w": np.ones(2, np.float32)}
    >>> one = Contribution(worker="a", num_examples=3, delta={"w": np.array([4, 8], np.float32)})
    >>> strategy.finish(strategy.fold(strategy.init(base), one), base)[0]["w"]
    array([3., 5.], dtype=float32)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from fluffle_common.tensors.weights import Weights
from fluffle_coordinator.strategy.base import NO_NEEDS, NO_TENSORS, Contribution, Needs
from fluffle_coordinator.strategy.weighted import Weighted, apply_delta

M = TypeVar("M")
T = TypeVar("T")

_MEAN, _SERVER = "mean/", "server/"  # in what is kept, if both keep something


class Transform(Protocol):
    """What is done to each contribution before it is averaged; a function will do."""

    def __call__(self, one: Contribution, /) -> Contribution:
        """Return the contribution that is averaged instead."""


class Mean(Protocol[M]):
    """How contributions become one delta; its state is that of one round."""

    @property
    def needs(self) -> Needs:
        """What it asks of the coordinator; nothing by default."""
        return NO_NEEDS

    def init(self, weights: Weights) -> M:
        """Return the state of a round without contributions."""

    def fold(self, state: M, one: Contribution) -> M:
        """Take one contribution in; may reuse the memory of ``state``."""

    def finish(self, state: M, weights: Weights) -> tuple[Weights, M]:
        """Return the mean delta, floats of any dtype, and the state of an empty round.

        The delta is the server step's to keep: it shares no memory with the state.
        """


@runtime_checkable
class Lasting(Protocol):
    """A mean whose state lives across rounds."""

    def dump(self, state: Any) -> Weights:
        """Return what is to be kept of the state of a closed round."""

    def load(self, saved: Weights, weights: Weights) -> Any:
        """Return the state that ``dump`` returned ``saved`` for."""


class Server(Protocol[T]):
    """How the mean delta becomes the next weights; its state lives across rounds.

    A class that inherits from this one has the defaults of a step that keeps nothing.
    """

    def init(self, weights: Weights) -> T:
        """Return the state that a run begins with."""

    def step(self, state: T, weights: Weights, delta: Weights) -> tuple[Weights, T]:
        """Return the next weights and the next state; see ``apply_delta``."""

    def dump(self, state: T) -> Weights:
        """Return the state as named tensors; nothing by default."""
        return NO_TENSORS

    def load(self, saved: Weights, weights: Weights) -> T:
        """Return the state that ``dump`` returned ``saved`` for."""
        return self.init(weights)


@dataclasses.dataclass(frozen=True)
class Replace(Server[None]):
    """The server step that ``replace`` makes."""

    def init(self, weights: Weights) -> None:
        """Return the state: there is none."""

    def step(self, state: None, weights: Weights, delta: Weights) -> tuple[Weights, None]:
        """Return the average."""
        return apply_delta(weights, delta), None


def replace() -> Replace:
    """Take the average as the next weights."""
    return Replace()


@dataclasses.dataclass(frozen=True)
class Running(Generic[M, T]):
    """The state of a pipeline: that of its mean in the open round, and that of its server step."""

    mean: M
    server: T


@dataclasses.dataclass(frozen=True)
class Pipeline(Generic[M, T]):
    """The strategy that ``pipeline`` makes."""

    transforms: tuple[Transform, ...]
    mean: Mean[M]
    server: Server[T]

    @property
    def needs(self) -> Needs:
        """What its mean needs."""
        return self.mean.needs

    @cached_property  # asking a runtime protocol takes longer than a small round's average
    def _lasting(self) -> Lasting | None:
        return self.mean if isinstance(self.mean, Lasting) else None

    def init(self, weights: Weights) -> Running[M, T]:
        """Return the state that a run begins with."""
        return Running(self.mean.init(weights), self.server.init(weights))

    def broadcast(self, state: Running[M, T]) -> Weights:
        """Return nothing: workers get the model alone."""
        return NO_TENSORS

    def fold(self, state: Running[M, T], one: Contribution) -> Running[M, T]:
        """Transform a contribution and give it to the mean."""
        for transform in self.transforms:
            one = transform(one)
        return Running(self.mean.fold(state.mean, one), state.server)

    def finish(self, state: Running[M, T], weights: Weights) -> tuple[Weights, Running[M, T]]:
        """Average, and take the server step."""
        new: Weights
        if isinstance(self.mean, Weighted) and isinstance(self.server, Replace):
            # As below, with one pass over the model instead of three.
            new, mean = self.mean.replaced(state.mean, weights)
            return new, Running(mean, state.server)
        delta, emptied = self.mean.finish(state.mean, weights)
        new, server = self.server.step(state.server, weights, delta)
        return new, Running(emptied, server)

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return what its mean has spent of privacy after so many rounds."""
        return self.mean.spent(rounds) if hasattr(self.mean, "spent") else {}

    def dump(self, state: Running[M, T]) -> Weights:
        """Return what the server step keeps, and the mean if it lasts; of most, that is nothing."""
        of_server = self.server.dump(state.server)
        if self._lasting is None:
            return of_server
        of_mean = self._lasting.dump(state.mean)
        return {**_under(_MEAN, of_mean), **_under(_SERVER, of_server)}

    def load(self, saved: Weights, weights: Weights) -> Running[M, T]:
        """Return the state that the next round begins with."""
        if self._lasting is None:
            return Running(self.mean.init(weights), self.server.load(saved, weights))
        mean: M = self._lasting.load(_from_under(_MEAN, saved), weights)
        return Running(mean, self.server.load(_from_under(_SERVER, saved), weights))


def pipeline(*transforms: Transform, mean: Mean[M], server: Server[T]) -> Pipeline[M, T]:
    """Put a strategy together.

    Args:
        transforms: what is done to each contribution first, in this order.
        mean: how contributions become one delta, such as ``weighted()``.
        server: how that becomes the next weights, such as ``replace()``.
    """
    return Pipeline(transforms, mean, server)


def _under(place: str, tensors: Weights) -> Weights:
    return {f"{place}{name}": tensor for name, tensor in tensors.items()}


def _from_under(place: str, tensors: Weights) -> Weights:
    return {n.removeprefix(place): t for n, t in tensors.items() if n.startswith(place)}
