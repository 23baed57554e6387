"""SCAFFOLD's server: it broadcasts the mean of all workers' control variates with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fluffle_common.tensors.layout import is_float
from fluffle_common.tensors.weights import Array, Weights
from fluffle_coordinator.strategy.base import Contribution, Needs, Strategy
from fluffle_coordinator.strategy.pipeline import (
    Pipeline,
    PipelineState,
    pipeline,
    replace,
    with_prefix,
    without_prefix,
)
from fluffle_coordinator.strategy.weighted import weighted

_MODEL, _CONTROL = "model/", "control/"  # prefixes in a checkpoint


class ScaffoldState(NamedTuple):
    """The state of ``Scaffold``.

    Args:
        inner: the state of the pipeline that averages the model.
        control: the server's control variate ``c``, in float64, for each float tensor of the model.
        changes: the sum of ``c_k+ - c_k`` over the open round's updates.
        updates: the number of these updates.
    """

    inner: PipelineState[Any, Any]
    control: Mapping[str, Array]
    changes: Mapping[str, Array]
    updates: int


@dataclass(frozen=True)
class Scaffold(Strategy[ScaffoldState]):
    """The strategy that ``scaffold`` returns."""

    model: Pipeline[Any, Any]
    workers: int | None

    @property
    def needs(self) -> Needs:
        """The pipeline's requirements, and the change of each worker's control variate."""
        return dataclasses.replace(self.model.needs, extra="model")

    def init(self, weights: Weights) -> ScaffoldState:
        """Return the initial state, with a control variate of zeros."""
        zeros = {n: np.zeros(w.shape) for n, w in weights.items() if is_float(w.dtype)}
        return ScaffoldState(self.model.init(weights), zeros, {}, 0)

    def broadcast(self, state: ScaffoldState) -> Weights:
        """Return ``c`` in float32, by the names of the model's tensors."""
        return {name: control.astype(np.float32) for name, control in state.control.items()}

    def fold(self, state: ScaffoldState, one: Contribution) -> ScaffoldState:
        """Fold an update into the model's mean, and add the change of its control variate."""
        changes = dict(state.changes)
        for name, change in one.extra.items():
            changes[name] = changes.get(name, 0.0) + change.astype(np.float64)
        return state._replace(
            inner=self.model.fold(state.inner, one), changes=changes, updates=state.updates + 1
        )

    def finish(self, state: ScaffoldState, weights: Weights) -> tuple[Weights, ScaffoldState]:
        """Average the model, and add the changes divided by the number of workers to ``c``."""
        new, inner = self.model.finish(state.inner, weights)
        workers = max(self.workers or 0, state.updates)
        control = {
            name: old + state.changes[name] / workers if name in state.changes else old
            for name, old in state.control.items()
        }
        return new, ScaffoldState(inner, control, {}, 0)

    def dump(self, state: ScaffoldState) -> Weights:
        """Return the control variate, and the tensors that the pipeline saves."""
        model = with_prefix(_MODEL, self.model.dump(state.inner))
        return model | with_prefix(_CONTROL, state.control)

    def load(self, saved: Weights, weights: Weights) -> ScaffoldState:
        """Restore the state that the next round begins with."""
        inner = self.model.load(without_prefix(_MODEL, saved), weights)
        return ScaffoldState(inner, without_prefix(_CONTROL, saved), {}, 0)


def scaffold(workers: int | None = None) -> Scaffold:
    """Return the strategy SCAFFOLD, which corrects the drift of workers whose data differ.

    The workers train with ``--local-rule scaffold``. Karimireddy et al., "SCAFFOLD: Stochastic
    Controlled Averaging for Federated Learning", ICML 2020: ``c <- c + (sum of c_k+ - c_k) / N``.
    The model is averaged by numbers of examples, as in ``fedavg``; the paper uses the plain mean.

    Args:
        workers: N, the number of workers in the federation; None for the number of each round's
            participants, if all workers take part in every round.

    Raises:
        ValueError: if ``workers`` is less than 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is out of range; a number of at least 1 is expected")
    return Scaffold(pipeline(mean=weighted(), server=replace()), workers)
