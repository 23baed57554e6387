"""Means that hold although some of the workers send anything they like.

They need all updates of a round at once. Each is laid on disk as it comes, and they are read from
there in blocks, so that memory stays that of the model, however many workers there are.
Updates are taken in the order of their workers' names: the order in which they came changes no bit.
Every update counts the same, since the number of examples is its worker's own claim.

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

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import Tensors, layout_for
from fluffle_common.tensors.on_disk import release_pages
from fluffle_common.tensors.weights import Array, Weights, largest
from fluffle_coordinator.strategy.base import Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks

_FLOAT = np.dtype(np.float64)
_END = largest(_FLOAT)
_ELEMENTS = 2**18  # of all updates together that are in memory at a time, 2 MiB
# So many multiplications BLAS does in one thread; handing small products to several is far slower.
_IN_ONE_THREAD = 2**17
_CLOSE_ENOUGH = 1e-6

Updates = tuple[tuple[str, Weights], ...]  # whose it is, and the delta


class Rule(Protocol):
    """How all updates of a round become one delta."""

    def __call__(self, updates: Sequence[Weights], delta: Tensors) -> None:
        """Write their mean into ``delta``, which is of float64."""


@dataclass(frozen=True)
class OfAll:
    """A mean of all updates at once, which are its state.

    Args:
        rule: what is made of them.
        needs: how many updates it needs at least.
    """

    rule: Rule
    needs: Needs

    def init(self, weights: Weights) -> Updates:
        """Return no updates."""
        return ()

    def fold(self, state: Updates, one: Contribution) -> Updates:
        """Keep an update, on disk."""
        return (*state, (one.worker, one.kept()))

    def finish(self, state: Updates, weights: Weights) -> tuple[Weights, Updates]:
        """Return the mean delta in float64; integers beyond 2**53 are rounded.

        Raises:
            ValueError: where there is no update.
        """
        if not state:
            raise ValueError("no update was folded: there is nothing to average")
        delta = layout_for(weights).empty_as(_FLOAT)
        in_order = sorted(state, key=lambda one: one[0])
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            self.rule([update for _, update in in_order], delta)
        return delta, ()


def median() -> OfAll:
    """Take the median of each coordinate; of an even number, the mean of the middle two.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
    2018, algorithm 1, option I.
    """

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        _average_middle(updates, delta, cut=(len(updates) - 1) // 2)

    return OfAll(rule, Needs(min_updates=3))


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
    return OfAll(rule, Needs(min_updates=fewest))


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
        chosen = _best(updates, delta, f)[:m]
        shares = np.zeros(len(updates))
        shares[chosen] = 1 / len(chosen)
        _combine(updates, shares, delta)

    return OfAll(rule, Needs(min_updates=max(2 * f + 3, m + f + 2)))


def rfa(iterations: int = 100, nu: float = 1e-6) -> OfAll:
    """Take the geometric median: the point of the least sum of distances to all updates.

    Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal
    Processing 2022, algorithm 2: the smoothed Weiszfeld algorithm. It begins at the weights that
    were sent out, so that an update counts no more for being large. The updates are read twice,
    however many iterations there are: their scalar products tell all distances.

    Args:
        iterations: the most iterations, from 1; it ends where one changes no share by more than a
            millionth. The paper, where each is a round of messages, makes do with 3.
        nu: a distance below this counts as this, above 0.

    Raises:
        ValueError: for an argument that is out of range.
    """
    within("iterations", iterations, 1)
    within("nu", nu, 0, above=True)

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        products, norms = _geometry(updates, delta)
        shares = np.zeros(len(updates))
        (near,) = np.isfinite(norms).nonzero()  # the others are too far away to be measured
        if near.size:
            seen = products[np.ix_(near, near)]
            shares[near] = _geometric_median(seen, norms[near], iterations, nu)
        else:
            shares += 1 / len(updates)
        _combine(updates, shares, delta)

    return OfAll(rule, Needs(min_updates=3))


def _part(fraction: float, count: int) -> int:
    """Return a part of a number, rounded down: 0.29 of 100 is 29, though not in binary."""
    return math.floor(fraction * count + _CLOSE_ENOUGH)


def _stacked(updates: Sequence[Weights], delta: Tensors) -> Iterator[tuple[Array, Array]]:
    """Yield blocks of the result, and beside each those of the updates, one a row, in float64."""
    size = max(1024, _ELEMENTS // len(updates))
    for into, *blocks in in_blocks(delta, *updates, size=size):
        rows = np.empty((len(blocks), into.size), _FLOAT)
        for row, block, update in zip(rows, blocks, updates, strict=True):
            row[...] = block
            release_pages(update)  # a touch may have brought far more than the block into memory
        yield into, rows


def _average_middle(updates: Sequence[Weights], delta: Tensors, cut: int) -> None:
    """Write the mean of each coordinate without the ``cut`` values at each of its ends."""
    for into, rows in _stacked(updates, delta):
        into[...] = _middle(rows, cut)


def _middle(rows: Array, cut: int) -> Array:
    """Return the mean of each column without the ``cut`` values at each of its ends."""
    columns = rows.T.copy()  # with the values of a column side by side
    columns.sort(axis=1)
    left = columns[:, cut : columns.shape[1] - cut]
    # Divided first, no sum is beyond the end of float64 by more than a rounding.
    mean: Array = np.clip((left / left.shape[1]).sum(axis=1), -_END, _END)
    return mean


def _combine(updates: Sequence[Weights], shares: Array, delta: Tensors) -> None:
    """Write the sum of the updates by their shares."""
    used = [place for place, share in enumerate(shares) if share]
    for into, rows in _stacked([updates[place] for place in used], delta):
        into[...] = 0
        for row, share in zip(rows, shares[used], strict=True):
            np.add(into, share * row, out=into)
        np.clip(into, -_END, _END, out=into)


def _geometry(updates: Sequence[Weights], like: Tensors) -> tuple[Array, Array]:
    """Return the products of the updates, seen from their median, and their own squared norms.

    Distances follow from the products, in one pass over the updates. As seen from the median, those
    that agree are near: what rounding does to them is small, however far away others are.
    """
    count = len(updates)
    products, norms = np.zeros((count, count)), np.zeros(count)
    width = max(32, _IN_ONE_THREAD // count**2)
    for _, rows in _stacked(updates, like):
        norms += np.square(rows).sum(axis=1)
        np.subtract(rows, _middle(rows, (count - 1) // 2), out=rows)
        for start in range(0, rows.shape[1], width):
            piece = rows[:, start : start + width]
            products += piece @ piece.T
    return products, norms


def _best(updates: Sequence[Weights], like: Tensors, f: int) -> list[int]:
    """Return the places of the updates by their scores in Krum, the best first."""
    products, norms = _geometry(updates, like)
    own = np.diag(products)
    apart = np.nan_to_num(own[:, None] + own[None, :] - 2 * products, nan=_END, posinf=_END)
    np.fill_diagonal(apart, np.inf)  # nobody is a neighbour of oneself
    closest = np.sort(apart, axis=1)[:, : max(1, len(updates) - f - 2)]
    return [int(place) for place in np.lexsort((norms, closest.sum(axis=1)))]


def _geometric_median(products: Array, norms: Array, iterations: int, nu: float) -> Array:
    """Return the shares of the updates in the point that is closest to all of them."""
    apart = np.sqrt(norms)  # from the weights that were sent out
    shares = np.zeros(len(norms))
    for _ in range(iterations):
        closeness = 1 / np.maximum(apart, nu)
        before, shares = shares, closeness / closeness.sum()
        if np.abs(shares - before).max() <= _CLOSE_ENOUGH:
            break
        pull = products @ shares
        apart = np.sqrt(np.maximum(np.diag(products) - 2 * pull + shares @ pull, 0))
    return shares
