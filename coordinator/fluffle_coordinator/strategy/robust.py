"""Means that hold although some of the workers send anything they like.

They need all updates of a round at once. The coordinator lays each on disk as it comes, and here
they are read in blocks, so that memory stays that of the model, however many workers there are.
Updates are taken in the order of their workers' names: the order in which they came changes no bit.
Every worker counts the same, since the number of examples is its own claim.

=================  ========================================  =============================
mean               source                                    withstands, of n updates
=================  ========================================  =============================
``median``         Yin et al., ICML 2018                     fewer than n / 2
``trimmed_mean``   Yin et al., ICML 2018                     ``fraction`` of them
``krum``           Blanchard et al., NeurIPS 2017            f, with n of at least 2 f + 3
``multi_krum``     the same                                  the same
``rfa``            Pillutla et al., IEEE TSP 2022            fewer than n / 2
=================  ========================================  =============================

Example:
    >>> mean = median()
    >>> base = {"w": np.zeros(2)}
    >>> state = mean.init(base)
    >>> for worker, learnt in (("a", [1, 2]), ("b", [2, 3]), ("c", [-900, 4])):
    ...     delta = {"w": np.array(learnt, float)}
    ...     state = mean.fold(state, Contribution(worker=worker, num_examples=1, delta=delta))
    >>> mean.finish(state, base)[0]["w"]
    array([1., 3.])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fluffle_common.tensors.layout import Tensors, layout_for
from fluffle_common.tensors.spool import let_go
from fluffle_common.tensors.weights import Array, Weights, largest
from fluffle_coordinator.strategy.arguments import within
from fluffle_coordinator.strategy.base import Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks

_FLOAT = np.dtype(np.float64)
_END = largest(_FLOAT)
_ELEMENTS = 2**20  # of all updates together that are in memory at a time, 8 MiB
_CLOSE_ENOUGH = 1e-6

Updates = tuple[Contribution, ...]


class Rule(Protocol):
    """How all updates of a round become one delta."""

    def __call__(self, updates: Sequence[Weights], delta: Tensors) -> None:
        """Write their mean into ``delta``, which is of float64."""


@dataclass(frozen=True)
class OfAll:
    """A mean of all updates at once; its state are the updates of the round.

    Args:
        rule: what is made of them.
        needs: that it needs all of them, and at least how many.
    """

    rule: Rule
    needs: Needs

    def init(self, weights: Weights) -> Updates:
        """Return no updates."""
        return ()

    def fold(self, state: Updates, one: Contribution) -> Updates:
        """Keep an update, which lies on disk."""
        return (*state, one)

    def finish(self, state: Updates, weights: Weights) -> tuple[Weights, Updates]:
        """Return the mean delta in float64; integers beyond 2**53 are rounded.

        Raises:
            ValueError: where there is no update.
        """
        if not state:
            raise ValueError("no update was folded: there is nothing to average")
        delta = layout_for(weights).empty_as(_FLOAT)
        in_order = sorted(state, key=lambda one: one.worker)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            self.rule([one.delta for one in in_order], delta)
        return delta, ()


def median() -> OfAll:
    """Take the median of each coordinate; of an even number, the mean of the middle two.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
    2018, algorithm 1, option I.
    """

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        _average_middle(updates, delta, cut=(len(updates) - 1) // 2)

    return OfAll(rule, Needs(all_updates=True, min_updates=3))


def trimmed_mean(fraction: float = 0.2) -> OfAll:
    """Average each coordinate without its largest and its smallest values.

    Yin et al. 2018 (see ``median``), algorithm 1, option II.

    Args:
        fraction: which part of the updates is left out at each end, rounded down; above 0 and below
            0.5. One update has to be left out: so ``1 / fraction`` updates are needed.

    Raises:
        ValueError: for a fraction that is out of range.
    """
    within("fraction", fraction, 0, 0.5, above=True, below=True)

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        _average_middle(updates, delta, cut=_part(fraction, len(updates)))

    fewest = max(3, math.ceil(1 / fraction - _CLOSE_ENOUGH))
    return OfAll(rule, Needs(all_updates=True, min_updates=fewest))


def krum(f: int = 1) -> OfAll:
    """Take the update that is closest to its nearest neighbours.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017. The score of an update is the sum of its squared distances to the n - f - 2 that
    are closest to it; of equal scores, the smaller update is taken.

    Args:
        f: how many workers may send anything; 2 f + 3 updates are needed.

    Raises:
        ValueError: for a number that is out of range.
    """
    return multi_krum(f, 1)


def multi_krum(f: int = 1, m: int = 2) -> OfAll:
    """Average the ``m`` updates of the best scores of ``krum``, all with the same weight.

    Args:
        f: how many workers may send anything.
        m: how many are averaged; at least 2 f + 3 and m + f + 2 updates are needed.

    Raises:
        ValueError: for a number that is out of range.
    """
    within("f", f, 0)
    within("m", m, 1)

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        chosen = _best(updates, f)[:m]
        shares = np.zeros(len(updates))
        shares[chosen] = 1 / len(chosen)
        _combine(updates, shares, delta)

    return OfAll(rule, Needs(all_updates=True, min_updates=max(2 * f + 3, m + f + 2)))


def rfa(iterations: int = 10, nu: float = 1e-6) -> OfAll:
    """Take the geometric median: the point of the least sum of distances to all updates.

    Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal
    Processing 2022, algorithm 2: the smoothed Weiszfeld algorithm. It begins at the weights that
    were sent out, so that an update counts no more for being large, and reads all updates once an
    iteration; it ends early where an iteration changes no share by more than a millionth.

    Args:
        iterations: the most iterations, from 1. The paper needs 3.
        nu: a distance below this counts as this, above 0.

    Raises:
        ValueError: for an argument that is out of range.
    """
    within("iterations", iterations, 1)
    within("nu", nu, 0, above=True)

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        shares = np.zeros(len(updates))  # the point is the sum of the updates by their shares
        for _ in range(iterations):
            closeness = 1 / np.maximum(_distances(updates, shares, delta), nu)
            if not closeness.any():  # all are too far away for float64
                closeness += 1
            before, shares = shares, closeness / closeness.sum()
            if np.abs(shares - before).max() <= _CLOSE_ENOUGH:
                break
        _combine(updates, shares, delta)

    return OfAll(rule, Needs(all_updates=True, min_updates=3))


def _part(fraction: float, count: int) -> int:
    """Return a part of a number, rounded down: 0.29 of 100 is 29, though not in binary."""
    return math.floor(fraction * count + _CLOSE_ENOUGH)


def _stacked(updates: Sequence[Weights], delta: Tensors) -> Iterator[tuple[Array, Array]]:
    """Yield blocks of the result, and beside each those of the updates, one a row, in float64."""
    size = max(1024, _ELEMENTS // len(updates))
    for into, *blocks in in_blocks(delta, *updates, size=size):
        rows = np.empty((len(blocks), into.size), _FLOAT)
        for row, block in zip(rows, blocks, strict=True):
            row[...] = block
        for update in updates:
            let_go(update)
        yield into, rows


def _average_middle(updates: Sequence[Weights], delta: Tensors, cut: int) -> None:
    """Write the mean of each coordinate without the ``cut`` values at each of its ends."""
    count = len(updates) - 2 * cut
    for into, rows in _stacked(updates, delta):
        columns = np.ascontiguousarray(rows.T)
        columns.sort(axis=1)
        # Divided first, no sum is beyond the end of float64 by more than a rounding.
        np.sum(columns[:, cut : cut + count] / count, axis=1, out=into)
        np.clip(into, -_END, _END, out=into)


def _combine(updates: Sequence[Weights], shares: Array, delta: Tensors) -> None:
    """Write the sum of the updates by their shares."""
    used = [place for place, share in enumerate(shares) if share]
    for into, rows in _stacked([updates[place] for place in used], delta):
        into[...] = 0
        for row, share in zip(rows, shares[used], strict=True):
            np.add(into, share * row, out=into)
        np.clip(into, -_END, _END, out=into)


def _distances(updates: Sequence[Weights], shares: Array, like: Tensors) -> Array:
    """Return how far each update is from the sum of all of them by their shares."""
    squares = np.zeros(len(updates))
    for _, rows in _stacked(updates, like):
        apart = rows - shares @ rows
        squares += np.vecdot(apart, apart)
    return np.sqrt(squares)


def _best(updates: Sequence[Weights], f: int) -> list[int]:
    """Return the places of the updates by their scores in Krum, the best first."""
    count = len(updates)
    squares, norms = np.zeros((count, count)), np.zeros(count)
    like = layout_for(updates[0]).empty_as(_FLOAT)
    for _, rows in _stacked(updates, like):
        norms += np.vecdot(rows, rows)
        for place, row in enumerate(rows[:-1]):
            apart = rows[place + 1 :] - row
            squares[place, place + 1 :] += np.vecdot(apart, apart)
    squares = np.minimum(squares + squares.T, _END)
    np.fill_diagonal(squares, np.inf)  # nobody is a neighbour of oneself
    closest = np.sort(squares, axis=1)[:, : max(1, count - f - 2)]
    scores = closest.sum(axis=1)
    return [int(place) for place in np.lexsort((norms, scores))]
