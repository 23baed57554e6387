"""SCAFFOLD's server: it broadcasts the mean of all workers' control variates with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import is_float
from fluffle_common.tensors.weights import Array, Weights, largest
from fluffle_coordinator.strategy.base import Contribution, Needs, Strategy
from fluffle_coordinator.strategy.linear_means import uniform
from fluffle_coordinator.strategy.pipeline import pipeline, replace, with_prefix, without_prefix

_MODEL, _CONTROL = "model/", "control/"  # prefixes in a checkpoint
_END = largest(np.dtype(np.float32))


class _State(NamedTuple):
    inner: Any  # the state of the strategy that averages the model
    control: Mapping[str, Array]  # c in float64, for each float tensor of the model
    changes: Mapping[str, Array] = MappingProxyType({})  # the sum of c_k+ - c_k in the open round
    updates: int = 0  # in that sum


@dataclass(frozen=True)
class _Scaffold(Strategy[_State]):
    model: Strategy[Any]
    workers: int | None

    @property
    def needs(self) -> Needs:
        return dataclasses.replace(self.model.needs, extra="model")

    def init(self, weights: Weights) -> _State:
        zeros = {n: np.zeros(w.shape) for n, w in weights.items() if is_float(w.dtype)}
        return _State(self.model.init(weights), zeros)

    def broadcast(self, state: _State) -> Weights:
        return {name: control.astype(np.float32) for name, control in state.control.items()}

    def fold(self, state: _State, one: Contribution) -> _State:
        changes = dict(state.changes)
        for name, change in one.extra.items():
            with np.errstate(over="ignore"):
                changes[name] = changes.get(name, 0.0) + change.astype(np.float64)
        return state._replace(
            inner=self.model.fold(state.inner, one), changes=changes, updates=state.updates + 1
        )

    def finish(self, state: _State, weights: Weights) -> tuple[Weights, _State]:
        new, inner = self.model.finish(state.inner, weights)
        workers = max(self.workers or 0, state.updates)
        control = {
            # Saturated, because a value beyond float32 could not be broadcast.
            name: np.clip(old + state.changes[name] / workers, -_END, _END)
            if name in state.changes
            else old
            for name, old in state.control.items()
        }
        return new, _State(inner, control)

    def dump(self, state: _State) -> Weights:
        model = with_prefix(_MODEL, self.model.dump(state.inner))
        return model | with_prefix(_CONTROL, state.control)

    def load(self, saved: Weights, weights: Weights) -> _State:
        inner = self.model.load(without_prefix(_MODEL, saved), weights)
        return _State(inner, without_prefix(_CONTROL, saved))


def scaffold(workers: int | None = None) -> Strategy[Any]:
    """Return the strategy SCAFFOLD, which corrects the drift of workers whose data differ.

    The workers train with ``--local-rule scaffold``. Karimireddy et al., "SCAFFOLD: Stochastic
    Controlled Averaging for Federated Learning", ICML 2020: ``c <- c + (sum of c_k+ - c_k) / N``.
    All workers have the same weight in both means. Weighting the model by examples would not move
    the optimum, which the control variates decide, but large workers would overshoot.

    Args:
        workers: N, the number of workers in the federation; None for the number of each round's
            participants, if all workers take part in every round.

    Raises:
        ValueError: if ``workers`` is out of range.
    """
    if workers is not None:
        within("workers", workers, 1)
    return _Scaffold(pipeline(mean=uniform(), server=replace()), workers)
