"""Linear means: weighted sums of the updates, with a factor computed from each update.

Summed in float64, so integers are exact up to 2**53. The mean by numbers of examples is in
``weighted``, which is faster, and exact for all integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.weights import Array, Weights, finite_norm, largest
from fluffle_coordinator.strategy.base import Contribution, Needs, parameters_of
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.pipeline import Mean
from fluffle_coordinator.strategy.weighted import SCALE, weighted

_FLOAT = np.dtype(np.float64)
_END = largest(_FLOAT)
_NO_TERMS = np.zeros(2)
_LEAST_LOSS = 1e-10  # because 0 has no negative powers
_MOST = 1e10  # of a loss, or of steps, so that sums of their powers cannot overflow


@dataclass(frozen=True)
class LinearSum:
    """The running sums of a round: of ``factor * delta``, and of the two terms."""

    total: Weights
    terms: Array
    empty: bool = True


@dataclass(frozen=True)
class Linear:
    """The mean ``scale(sum of terms) * sum(factor * delta)``.

    ``factor`` returns the factor and the two terms of an update, and ``scale`` the factor on the
    sum, given the sums of the terms.
    """

    factor: Callable[[Contribution], tuple[float, float, float]]
    scale: Callable[[float, float], float]
    needs: Needs = field(default_factory=Needs)
    averages: bool = True  # whether the shares of the updates add up to 1

    def with_statistics(self, names: frozenset[str]) -> Mean[Any]:
        """Return the mean for a model with these statistics.

        A sum of more than 1 of the updates extrapolates, which may make a variance negative.
        """
        return self if self.averages else _Apart(self, names)

    def init(self, weights: Weights) -> LinearSum:
        """Return an empty sum."""
        return LinearSum(layout_for(weights).empty_as(_FLOAT), _NO_TERMS)

    def fold(self, state: LinearSum, one: Contribution) -> LinearSum:
        """Add an update to the sum, in place."""
        factor, *terms = self.factor(one)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for total, values in in_blocks(state.total, one.delta):
                scaled = values.astype(_FLOAT)
                scaled *= factor * SCALE
                if state.empty:
                    total[...] = scaled
                else:
                    np.add(total, scaled, out=total)
        return LinearSum(state.total, state.terms + terms, empty=False)

    def finish(self, state: LinearSum, weights: Weights) -> tuple[Weights, LinearSum]:
        """Return the mean delta in float64, and an empty sum.

        Raises:
            ValueError: if no update was folded.
        """
        if state.empty:
            raise ValueError("there is nothing to average, because no update has been added")
        scale = self.scale(*map(float, state.terms)) / SCALE
        delta = layout_for(weights).empty_as(_FLOAT)
        with np.errstate(over="ignore", under="ignore"):
            for total, result in in_blocks(state.total, delta):
                # If the scale is 0, the sum may have overflowed.
                np.multiply(total if scale else 0.0, scale, out=result)
                np.clip(result, -_END, _END, out=result)
        return delta, LinearSum(state.total, _NO_TERMS)


@dataclass(frozen=True)
class _Apart(Mean[Any]):
    """A mean of the parameters, beside the mean of the statistics by numbers of examples."""

    mean: Linear
    statistics: frozenset[str]

    @property
    def needs(self) -> Needs:
        return self.mean.needs

    def init(self, weights: Weights) -> Any:
        parameters, others = self._split(weights)
        return self.mean.init(parameters), weighted().init(others)

    def fold(self, state: Any, one: Contribution) -> Any:
        parameters, others = (replace(one, delta=delta) for delta in self._split(one.delta))
        return self.mean.fold(state[0], parameters), weighted().fold(state[1], others)

    def finish(self, state: Any, weights: Weights) -> tuple[Weights, Any]:
        parameters, others = self._split(weights)
        delta, first = self.mean.finish(state[0], parameters)
        of_others, second = weighted().finish(state[1], others)
        return {**delta, **of_others}, (first, second)

    def _split(self, tensors: Weights) -> tuple[Weights, Weights]:
        parameters = parameters_of(tensors, self.statistics)
        return parameters, parameters_of(tensors, frozenset(parameters))


def uniform() -> Linear:
    """Return the mean with equal weights, whatever the numbers of examples."""
    return Linear(lambda one: (one.discount, one.discount, 0.0), lambda count, _: 1 / count)


def q_fair(q: float = 1.0, lr: float = 0.1) -> Linear:
    """Return the mean of q-FedAvg, which gives workers with a larger loss more weight.

    Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, algorithm 2, with L =
    1 / lr: ``sum(F^q delta) / sum(F^q + q F^(q-1) |delta|² / lr)``. F is the metric ``loss`` of an
    update, the mean loss during training; the paper uses the loss before training.

    Args:
        q: the strength of fairness, from 0 (equal weights) to 10.
        lr: the learning rate of the workers, above 0.

    Raises:
        ValueError: if an argument is out of range.
    """
    within("q", q, 0, 10)
    within("lr", lr, 0, above=True)

    def factor(one: Contribution) -> tuple[float, float, float]:
        loss = max(one.metrics["loss"], _LEAST_LOSS)
        norm = finite_norm(one.delta) if q else 0.0
        square = norm * norm  # infinite if it overflows, where ** raises: the step is then 0
        share = loss**q + q * loss ** (q - 1) * square / lr
        return one.discount * loss**q, one.discount * share, 0.0

    needs = Needs(metrics=("loss",), ranges={"loss": (0, _MOST)})
    return Linear(factor, lambda terms, _: 1 / terms, needs, averages=False)


def normalised() -> Linear:
    """Return the mean of FedNova: of the progress per local step, whatever the numbers of steps.

    Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020, equation 6, for plain local SGD: ``sum(p t) * sum(p delta / t)``,
    with each worker's share p of the examples and its number of local steps t, which is the metric
    ``steps`` of its update.
    """

    def factor(one: Contribution) -> tuple[float, float, float]:
        steps = one.metrics["steps"]
        return one.weight / steps, one.weight * steps, one.weight

    needs = Needs(metrics=("steps",), ranges={"steps": (1, _MOST)})
    return Linear(factor, lambda taken, examples: taken / examples**2, needs, averages=False)
