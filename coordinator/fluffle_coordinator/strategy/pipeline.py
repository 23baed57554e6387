"""Pipelines: strategies composed of transforms of a contribution, a mean and a server step.

::

    contribution ──transforms──> mean ──mean delta──> server ──> the next weights

The parts are independent of each other. The mean delta is a pseudo-gradient, so that a server step
is an ordinary optimizer (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, section 2).

The statistics of a model, such as running means, have no gradient. Their mean delta is added to
them, and the server step receives the parameters only. Transforms and means receive all tensors. If
one of these must treat statistics in another way, it has a method ``with_statistics``, as a
strategy has, which returns the transform or the mean that does.

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
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from fluffle_common.tensors.weights import Array, Weights, same_form
from fluffle_coordinator.strategy.base import (
    NO_TENSORS,
    Contribution,
    Needs,
    Strategy,
    parameters_of,
    with_statistics,
)
from fluffle_coordinator.strategy.weighted import Weighted, apply_delta

M = TypeVar("M")
T = TypeVar("T")

_MEAN, _SERVER = "mean/", "server/"  # prefixes in a checkpoint, if the mean saves something too


Transform = Callable[[Contribution], Contribution]
"""A function from each contribution to the one that is averaged in its place."""


class Mean(Protocol[M]):
    """The rule by which contributions become one delta; its state is that of one round.

    If the state lasts across rounds, the mean has ``dump`` and ``load`` too, as a ``Server`` has.
    """

    @property
    def needs(self) -> Needs:
        """Its requirements; none by default."""
        return Needs()

    def init(self, weights: Weights) -> M:
        """Return the state of a round without contributions."""

    def fold(self, state: M, one: Contribution) -> M:
        """Return the state with one more contribution; may reuse the memory of ``state``."""

    def finish(self, state: M, weights: Weights) -> tuple[Weights, M]:
        """Return the mean delta, in floats of any dtype, and the state of an empty round.

        The delta shares no memory with the state, so the server step may keep it.
        """


class Server(Protocol[T]):
    """The step from the mean delta to the next weights; its state lasts across rounds.

    Its weights and its delta are those of the parameters; statistics take no step. A class that
    inherits from this one has the defaults of a step that keeps nothing.
    """

    def init(self, weights: Weights) -> T:
        """Return the initial state of a run."""

    def step(self, state: T, weights: Weights, delta: Weights) -> tuple[Weights, T]:
        """Return the next weights and the next state; see ``apply_delta``."""

    def dump(self, state: T) -> Weights:
        """Return the state as named tensors; none by default."""
        return NO_TENSORS

    def load(self, saved: Weights, weights: Weights) -> T:
        """Restore the state from saved tensors."""
        return self.init(weights)


@dataclasses.dataclass(frozen=True)
class _Replace(Server[None]):
    def init(self, weights: Weights) -> None:
        pass

    def step(self, state: None, weights: Weights, delta: Weights) -> tuple[Weights, None]:
        return apply_delta(weights, delta), None


def replace() -> Server[None]:
    """Return the server step that adds the mean delta to the weights: the average replaces them."""
    return _Replace()


@dataclasses.dataclass(frozen=True)
class _PipelineState(Generic[M, T]):
    mean: M  # in the open round
    server: T


@dataclasses.dataclass(frozen=True)
class _Pipeline(Strategy[_PipelineState[M, T]]):
    transforms: tuple[Transform, ...]
    mean: Mean[M]
    server: Server[T]
    statistics: frozenset[str] = frozenset()

    @property
    def needs(self) -> Needs:
        return self.mean.needs

    def with_statistics(self, names: frozenset[str]) -> Strategy[_PipelineState[M, T]]:
        transforms = tuple([with_statistics(one, names) for one in self.transforms])
        mean = with_statistics(self.mean, names)
        return dataclasses.replace(self, transforms=transforms, mean=mean, statistics=names)

    def init(self, weights: Weights) -> _PipelineState[M, T]:
        parameters = parameters_of(weights, self.statistics)
        return _PipelineState(self.mean.init(weights), self.server.init(parameters))

    def fold(self, state: _PipelineState[M, T], one: Contribution) -> _PipelineState[M, T]:
        for transform in self.transforms:
            one = transform(one)
        return _PipelineState(self.mean.fold(state.mean, one), state.server)

    def finish(
        self, state: _PipelineState[M, T], weights: Weights
    ) -> tuple[Weights, _PipelineState[M, T]]:
        new: Weights
        if isinstance(self.mean, Weighted) and isinstance(self.server, _Replace):
            # The same result as below, in one pass over the model instead of three.
            new, mean = self.mean.replaced(state.mean, weights)
            return new, _PipelineState(mean, state.server)
        delta, mean = self.mean.finish(state.mean, weights)
        parameters, change = (parameters_of(of, self.statistics) for of in (weights, delta))
        new, server = self.server.step(state.server, parameters, change)
        if self.statistics:
            same_form(new, parameters)  # below, NumPy would broadcast a tensor of another shape
            stepped, new = new, apply_delta(weights, delta)
            for name, tensor in stepped.items():
                new[name][...] = tensor
        return new, _PipelineState(mean, server)

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return the privacy cost of so many rounds, if its mean accounts for it."""
        return self.mean.spent(rounds) if hasattr(self.mean, "spent") else {}

    def dump(self, state: _PipelineState[M, T]) -> Weights:
        server = self.server.dump(state.server)
        if not hasattr(self.mean, "dump"):
            return server
        mean = self.mean.dump(state.mean)
        return {**with_prefix(_MEAN, mean), **with_prefix(_SERVER, server)}

    def load(self, saved: Weights, weights: Weights) -> _PipelineState[M, T]:
        parameters = parameters_of(weights, self.statistics)
        if not hasattr(self.mean, "load"):
            return _PipelineState(self.mean.init(weights), self.server.load(saved, parameters))
        mean = self.mean.load(without_prefix(_MEAN, saved), weights)
        return _PipelineState(mean, self.server.load(without_prefix(_SERVER, saved), parameters))


def pipeline(
    *transforms: Transform, mean: Mean[M], server: Server[T]
) -> Strategy[_PipelineState[M, T]]:
    """Return a strategy composed of these parts.

    Args:
        transforms: applied to each contribution, in this order.
        mean: the mean, such as ``weighted()``.
        server: the server step, such as ``replace()``.
    """
    return _Pipeline(transforms, mean, server)


def with_prefix(prefix: str, tensors: Weights) -> dict[str, Array]:
    """Return tensors under names with a prefix, so that several sets can be saved together."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Weights) -> dict[str, Array]:
    """Return the tensors whose names have a prefix, under names without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
