"""Robust means, which withstand arbitrary updates from some of the workers.

They need all updates of a round at once. Updates are moved to disk as they arrive, and read from
there in blocks, so memory stays that of the model, however many workers there are. They are taken
in the order of their workers' names, so the order of arrival does not change the result. All have
the same weight, since the number of examples is the worker's own claim.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import Tensors, layout_for
from fluffle_common.tensors.on_disk import release_pages
from fluffle_common.tensors.weights import Array, Weights, largest
from fluffle_coordinator.strategy.base import Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.pipeline import Mean

_FLOAT = np.dtype(np.float64)
_END = largest(_FLOAT)
_ELEMENTS = 2**18  # elements of all updates together in memory at a time: 2 MiB
# The size of a product that BLAS computes in one thread; several threads are far slower for these.
_IN_ONE_THREAD = 2**17
_TOLERANCE = 1e-6
_MOST_WORKERS = 10**6

Updates = tuple[tuple[str, Weights], ...]  # the worker and its delta, on disk


@dataclass(frozen=True)
class _RobustMean(Mean[Updates]):
    """A mean of all updates at once; its state is the updates.

    The mean delta is float64, so integers beyond 2**53 are rounded. ``rule`` writes the mean of the
    updates into a delta.
    """

    rule: Callable[[Sequence[Weights], Tensors], None]
    min_updates: int = 3

    @property
    def needs(self) -> Needs:
        return Needs(min_updates=self.min_updates)

    def init(self, weights: Weights) -> Updates:
        return ()

    def fold(self, state: Updates, one: Contribution) -> Updates:
        return (*state, (one.worker, one.kept()))

    def finish(self, state: Updates, weights: Weights) -> tuple[Weights, Updates]:
        if not state:
            raise ValueError("there is nothing to average, because no update has been added")
        delta = layout_for(weights).empty_as(_FLOAT)
        by_name = sorted(state, key=lambda update: update[0])
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            self.rule([update for _, update in by_name], delta)
        return delta, ()


def median() -> Mean[Updates]:
    """Return the coordinate-wise median; of an even number of updates, the mean of the middle two.

    It withstands fewer than half of the updates, and ``trimmed_mean`` its ``fraction`` of them.
    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
    2018, algorithm 1, option I.
    """

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        _average_middle(updates, delta, cut=(len(updates) - 1) // 2)

    return _RobustMean(rule)


def trimmed_mean(fraction: float = 0.2) -> Mean[Updates]:
    """Return the coordinate-wise mean without the largest and the smallest values.

    Yin et al. 2018 (see ``median``), algorithm 1, option II.

    Args:
        fraction: the fraction of the values that is left out at each end, rounded down; above 0 and
            below 0.5. At least one must be left out, which takes ``1 / fraction`` updates.

    Raises:
        ValueError: if the fraction is out of range.
    """
    within("fraction", fraction, 0, 0.5, above=True, below=True)

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        # 0.29 of 100 is 29, though not in binary.
        cut = math.floor(fraction * len(updates) + _TOLERANCE)
        _average_middle(updates, delta, min(cut, (len(updates) - 1) // 2))

    return _RobustMean(rule, max(3, math.ceil(1 / fraction - _TOLERANCE)))


def krum(f: int = 1) -> Mean[Updates]:
    """Return the mean that selects the update closest to its nearest neighbors.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017. The score of an update is the sum of its squared distances to the n - f - 2
    closest ones. Between equal scores, the update with the smaller norm wins.

    Args:
        f: how many arbitrary updates it withstands; it needs 2 f + 3 updates.

    Raises:
        ValueError: if ``f`` is out of range.
    """
    return multi_krum(f, 1)


def multi_krum(f: int = 1, m: int = 2) -> Mean[Updates]:
    """Return the mean of the ``m`` updates with the best scores (see ``krum``), equally weighted.

    Args:
        f: how many arbitrary updates it withstands.
        m: how many updates are averaged; it needs at least 2 f + 3 and m + f + 2 updates.

    Raises:
        ValueError: if an argument is out of range.
    """
    within("f", f, 0, _MOST_WORKERS)
    within("m", m, 1, _MOST_WORKERS)

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        chosen = _best(updates, delta, f)[:m]
        shares = np.zeros(len(updates))
        shares[chosen] = 1 / len(chosen)
        _combine(updates, shares, delta)

    return _RobustMean(rule, max(2 * f + 3, m + f + 2))


def rfa(iterations: int = 1000, nu: float = 1e-6) -> Mean[Updates]:
    """Return the geometric median: the point with the smallest sum of distances to all updates.

    Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal
    Processing 2022, algorithm 2, the smoothed Weiszfeld algorithm. It withstands fewer than half of
    the updates. It starts from the received weights, so that a large update gets no more weight.
    The updates are read only twice, however many iterations there are, since all distances follow
    from their scalar products.

    Args:
        iterations: the most iterations, from 1. It stops when no share changes by more than a
            millionth, mostly after a few dozen; updates that almost lie on a line take hundreds.
            The paper uses 3, as each iteration there is a round of messages.
        nu: the smallest distance, above 0; smaller ones are rounded up to it.

    Raises:
        ValueError: if an argument is out of range.
    """
    within("iterations", iterations, 1)
    within("nu", nu, 0, above=True)

    def rule(updates: Sequence[Weights], delta: Tensors) -> None:
        products, norms = _geometry(updates, delta)
        shares = np.zeros(len(updates))
        # The distances of the others overflow, from the received weights or from the median.
        (near,) = np.isfinite(norms + np.diag(products)).nonzero()
        if near.size:
            near_products = products[np.ix_(near, near)]
            shares[near] = _geometric_median(near_products, norms[near], iterations, nu)
        else:
            shares += 1 / len(updates)
        _combine(updates, shares, delta)

    return _RobustMean(rule)


def _stacked(updates: Sequence[Weights], delta: Tensors) -> Iterator[tuple[Array, Array]]:
    """Yield each block of the result with those of the updates, one per row, in float64."""
    size = max(1024, _ELEMENTS // len(updates))
    for into, *blocks in in_blocks(delta, *updates, size=size):
        rows = np.empty((len(blocks), into.size), _FLOAT)
        for row, block, update in zip(rows, blocks, updates, strict=True):
            row[...] = block
            release_pages(update)  # reading a block may have mapped far more than that into memory
        yield into, rows


def _average_middle(updates: Sequence[Weights], delta: Tensors, cut: int) -> None:
    """Write the mean of each coordinate without the ``cut`` smallest and largest values."""
    for into, rows in _stacked(updates, delta):
        into[...] = _middle(rows, cut)


def _middle(rows: Array, cut: int) -> Array:
    """Return the mean of each column without the ``cut`` smallest and largest values."""
    columns = rows.T.copy()  # so that the values of a column are contiguous
    columns.sort(axis=1)
    middle = columns[:, cut : columns.shape[1] - cut]
    # Divided before the sum, which then overflows float64 by at most a rounding error.
    mean: Array = np.clip((middle / middle.shape[1]).sum(axis=1), -_END, _END)
    return mean


def _combine(updates: Sequence[Weights], shares: Array, delta: Tensors) -> None:
    """Write the sum of the updates, each multiplied by its share."""
    used = np.flatnonzero(shares).tolist()
    for into, rows in _stacked([updates[index] for index in used], delta):
        into[...] = 0
        for row, share in zip(rows, shares[used], strict=True):
            np.add(into, share * row, out=into)
        np.clip(into, -_END, _END, out=into)


def _geometry(updates: Sequence[Weights], like: Tensors) -> tuple[Array, Array]:
    """Return the scalar products of the updates minus their median, and their own squared norms.

    All distances follow from the products, in one pass over the updates. Updates that agree are
    close to the median, so their rounding errors are small, however far away others are.
    """
    count = len(updates)
    products, norms = np.zeros((count, count)), np.zeros(count)
    width = max(32, _IN_ONE_THREAD // count**2)
    for _, rows in _stacked(updates, like):
        norms += np.square(rows).sum(axis=1)
        np.subtract(rows, _middle(rows, (count - 1) // 2), out=rows)
        for start in range(0, rows.shape[1], width):
            columns = rows[:, start : start + width]
            products += columns @ columns.T
    return products, norms


def _best(updates: Sequence[Weights], like: Tensors, f: int) -> list[int]:
    """Return the indices of the updates in the order of their Krum scores, the best first."""
    products, norms = _geometry(updates, like)
    own = np.diag(products)
    squares = own[:, None] + own[None, :] - 2 * products
    distances = np.nan_to_num(squares, nan=_END, posinf=_END)
    np.fill_diagonal(distances, np.inf)  # an update is not its own neighbour
    closest = np.sort(distances, axis=1)[:, : max(1, len(updates) - f - 2)]
    return [int(index) for index in np.lexsort((norms, closest.sum(axis=1)))]


def _geometric_median(products: Array, norms: Array, iterations: int, nu: float) -> Array:
    """Return the shares of the updates in their geometric median."""
    distances = np.sqrt(norms)  # from the received weights
    shares = np.zeros(len(norms))
    for _ in range(iterations):
        inverse = 1 / np.maximum(distances, nu)
        before, shares = shares, inverse / inverse.sum()
        if np.abs(shares - before).max() <= _TOLERANCE:
            break
        projections = products @ shares
        squares = np.diag(products) - 2 * projections + shares @ projections
        distances = np.sqrt(np.maximum(squares, 0))
    return shares
