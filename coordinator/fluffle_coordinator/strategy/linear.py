"""Means in which each update has a factor of its own; folded one at a time, in float64.

The mean by numbers of examples is in ``weighted``, which is quicker, and exact for integers; here
integers are exact up to 2**53.

Example:
    >>> mean = uniform()
    >>> state = mean.init(base := {"w": np.zeros(2)})
    >>> for learnt, n in (([1, 2], 1), ([4, 8], 900)):
    ...     delta = {"w": np.array(learnt, float)}
    ...     state = mean.fold(state, Contribution(worker="a", num_examples=n, delta=delta))
    >>> mean.finish(state, base)[0]["w"]
    array([2.5, 5. ])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.weights import Array, Weights, finite_norm, largest
from fluffle_coordinator.strategy.base import Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks

_FLOAT = np.dtype(np.float64)
_END = largest(_FLOAT)
_SMALL = 2.0**-64  # as in ``weighted``: sums are kept smaller by this, which costs no bit
_LOSSES = 1e-10, 1e10  # what is below or above counts as these
_STEPS = 1.0, 1e10
_NO_TERMS = np.zeros(2)


@dataclass(frozen=True)
class Folded:
    """The sum of a round: of ``factor * delta``, and of the two terms that end it."""

    total: Weights
    terms: Array
    empty: bool = True


@dataclass(frozen=True)
class Linear:
    """The mean ``scale(sum of terms) * sum(factor * delta)``.

    Args:
        factor: of one update; and its two terms.
        scale: what the sum is multiplied by, given the sums of the terms.
        needs: what it asks of the coordinator.
    """

    factor: Callable[[Contribution], tuple[float, float, float]]
    scale: Callable[[float, float], float]
    needs: Needs

    def init(self, weights: Weights) -> Folded:
        """Return an empty sum."""
        return Folded(layout_for(weights).empty_as(_FLOAT), _NO_TERMS)

    def fold(self, state: Folded, one: Contribution) -> Folded:
        """Add an update to the sum, in place."""
        factor, *terms = self.factor(one)
        with np.errstate(under="ignore"):
            for total, values in in_blocks(state.total, one.delta):
                scaled = values.astype(_FLOAT)
                scaled *= factor * _SMALL
                if state.empty:
                    total[...] = scaled
                else:
                    np.add(total, scaled, out=total)
        return Folded(state.total, state.terms + terms, empty=False)

    def finish(self, state: Folded, weights: Weights) -> tuple[Weights, Folded]:
        """Return the mean delta in float64, and an empty sum.

        Raises:
            ValueError: where nothing was folded.
        """
        if state.empty:
            raise ValueError("no update was folded: there is nothing to average")
        scale = self.scale(*map(float, state.terms)) / _SMALL
        delta = layout_for(weights).empty_as(_FLOAT)
        with np.errstate(over="ignore", under="ignore"):
            for total, result in in_blocks(state.total, delta):
                np.multiply(total, scale, out=result)
                np.clip(result, -_END, _END, out=result)
        return delta, Folded(state.total, _NO_TERMS)


def uniform() -> Linear:
    """Average all updates with the same weight, however many examples they were trained on."""
    return Linear(
        lambda one: (one.discount, one.discount, 0.0), lambda count, _: 1 / count, Needs()
    )


def q_fair(q: float = 1.0, lr: float = 0.1) -> Linear:
    """Weigh workers by their losses, so that those who are worst off count more (q-FedAvg).

    Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, algorithm 2, with L =
    1 / lr: ``sum(F^q delta) / sum(F^q + q F^(q-1) |delta|² / lr)``. F is the metric ``loss`` of an
    update: the mean loss during the training, where the paper has the loss before it.

    Args:
        q: how much fairness counts, from 0 (all workers the same) to 10.
        lr: the learning rate of the workers, above 0.

    Raises:
        ValueError: for an argument that is out of range.
    """
    within("q", q, 0, 10)
    within("lr", lr, 0, above=True)

    def factor(one: Contribution) -> tuple[float, float, float]:
        loss = min(max(one.metrics["loss"], _LOSSES[0]), _LOSSES[1])
        square = finite_norm(one.delta) ** 2 if q else 0.0
        share = loss**q + q * loss ** (q - 1) * square / lr
        return one.discount * loss**q, one.discount * share, 0.0

    return Linear(factor, lambda terms, _: 1 / terms, Needs(metrics=("loss",)))


def normalised() -> Linear:
    """Average the progress of one local step, so that a worker of many steps pulls no harder.

    FedNova (Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020, equation 6), for plain local SGD: with the shares p of the examples
    and the numbers of steps t, ``sum(p t) * sum(p delta / t)``. The metric ``steps`` of an update
    is its number of local steps.
    """

    def factor(one: Contribution) -> tuple[float, float, float]:
        steps = min(max(one.metrics["steps"], _STEPS[0]), _STEPS[1])
        return one.weight / steps, one.weight * steps, one.weight

    return Linear(factor, lambda taken, examples: taken / examples**2, Needs(metrics=("steps",)))
