"""SCAFFOLD's server: the mean of all workers' control variates, broadcast with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fluffle_common.tensors.layout import is_float
from fluffle_common.tensors.weights import Array, Weights
from fluffle_coordinator.strategy.base import Contribution, Needs, Strategy
from fluffle_coordinator.strategy.pipeline import Pipeline, Running, pipeline, replace
from fluffle_coordinator.strategy.weighted import weighted

_OF_THE_MODEL, _CONTROL = "model/", "control/"


class Controlled(NamedTuple):
    """The state: that of the model's own strategy, and the control variate.

    Args:
        inner: how the model is averaged.
        control: ``c``, in float64, for each float tensor of the model.
        changes: the sum of ``c_k+ - c_k`` of the open round's updates.
        updates: how many there are.
    """

    inner: Running[Any, Any]
    control: Mapping[str, Array]
    changes: Mapping[str, Array]
    updates: int


@dataclass(frozen=True)
class Scaffold(Strategy[Controlled]):
    """The strategy that ``scaffold`` makes."""

    model: Pipeline[Any, Any]
    workers: int | None

    @property
    def needs(self) -> Needs:
        """What the model's own strategy needs, and by how much each worker's variate changed."""
        return dataclasses.replace(self.model.needs, extra="model")

    def init(self, weights: Weights) -> Controlled:
        """Return control variates of zeros."""
        zeros = {n: np.zeros(w.shape) for n, w in weights.items() if is_float(w.dtype)}
        return Controlled(self.model.init(weights), zeros, {}, 0)

    def broadcast(self, state: Controlled) -> Weights:
        """Return ``c`` in float32, by the names of the model's tensors."""
        return {name: one.astype(np.float32) for name, one in state.control.items()}

    def fold(self, state: Controlled, one: Contribution) -> Controlled:
        """Take an update in, and the change of its worker's control variate."""
        changes = dict(state.changes)
        for name, change in one.extra.items():
            changes[name] = changes.get(name, 0.0) + change.astype(np.float64)
        return state._replace(
            inner=self.model.fold(state.inner, one), changes=changes, updates=state.updates + 1
        )

    def finish(self, state: Controlled, weights: Weights) -> tuple[Weights, Controlled]:
        """Average the model; move ``c`` by the share of all workers that took part."""
        new, inner = self.model.finish(state.inner, weights)
        workers = max(self.workers or 0, state.updates)
        control = {
            name: one + state.changes[name] / workers if name in state.changes else one
            for name, one in state.control.items()
        }
        return new, Controlled(inner, control, {}, 0)

    def dump(self, state: Controlled) -> Weights:
        """Return the control variate, and what the model's own strategy keeps."""
        inner = {f"{_OF_THE_MODEL}{n}": one for n, one in self.model.dump(state.inner).items()}
        return inner | {f"{_CONTROL}{name}": one for name, one in state.control.items()}

    def load(self, saved: Weights, weights: Weights) -> Controlled:
        """Return the state that the next round begins with."""

        def under(prefix: str) -> dict[str, Array]:
            found = saved.items()
            return {n.removeprefix(prefix): one for n, one in found if n.startswith(prefix)}

        return Controlled(self.model.load(under(_OF_THE_MODEL), weights), under(_CONTROL), {}, 0)


def scaffold(workers: int | None = None) -> Scaffold:
    """Correct the drift of workers whose data differ; they train with ``--local-rule scaffold``.

    From Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    ICML 2020: ``c <- c + (sum of c_k+ - c_k) / N``. The model is averaged as by ``fedavg``, by
    numbers of examples, where the paper takes the plain mean.

    Args:
        workers: N, all workers of the federation; None: those of each round, for a federation in
            which all take part in every round.

    Raises:
        ValueError: if ``workers`` is less than 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is out of range; a number from 1 is expected")
    return Scaffold(pipeline(mean=weighted(), server=replace()), workers)
