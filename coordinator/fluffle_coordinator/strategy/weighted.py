"""The mean weighted by numbers of examples, ``sum(w_k * delta_k) / sum(w_k)``.

The weight of a contribution is ``w_k = n_k * phi(s_k)``: its number of examples times the
schedule's discount for its staleness.

Floats are summed in float64. A model with tensors of only one float dtype is summed as one vector,
however many tensors it has, and its updates may come in pieces. Integers are summed exactly, in 128
bits, and weighted by examples alone, since a discount is not an integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.in_pieces import InPieces
from fluffle_common.tensors.layout import Layout, Tensors, layout_for, layout_of_signature
from fluffle_common.tensors.weights import (
    BFLOAT16,
    Array,
    Weights,
    check_finite,
    is_float,
    largest,
)
from fluffle_coordinator.strategy import integer_sum
from fluffle_coordinator.strategy.base import Contribution, Needs
from fluffle_coordinator.strategy.blocks import BLOCK, cut, in_blocks

# Sums are scaled by this, so that the sum of two updates of 1e308 does not overflow. A power of two
# loses no bits, except that values below 1e-288 are rounded to a multiple of 1e-304.
SCALE = 2.0**-64
_FLOAT, _INTEGER = np.dtype(np.float64), np.dtype(np.int64)
_NOTHING: Array = np.empty(0)
_UNDIVIDED = BLOCK  # the most values that ``Vector`` sums in one piece


class Vector:
    """The sums of a model of one float dtype: a float64 vector in two pieces of memory.

    The first piece is as large as the model and becomes the next model: the average is written over
    sums that were already read, so it needs no memory of its own. The second is reused in every
    round. A small model's sums are all in the second, because vectors in one piece take less time.
    """

    def __init__(self, layout: Layout, rest: Array | None = None) -> None:
        assert layout.dtype is not None
        size = layout.nbytes // layout.dtype.itemsize
        begin = layout.nbytes // _FLOAT.itemsize if size > _UNDIVIDED else 0
        self.layout = layout
        self.memory = np.empty(layout.nbytes, np.uint8)  # takes only address space until written
        self.first = self.memory[: begin * _FLOAT.itemsize].view(_FLOAT)
        self.rest = np.empty(size - begin, _FLOAT) if rest is None else rest


@dataclass(frozen=True)
class Sum:
    """The running sums of a round: sum(w_k * delta_k), sum(n_k) and sum(w_k).

    While ``num_examples`` is 0, ``totals`` is uninitialized memory. For floats, it holds float64
    sums times ``SCALE``; for integers, the upper halves of the sums followed by the lower halves
    (see ``integer_sum``).
    """

    totals: Vector | Tensors
    num_examples: int = 0
    weight: float = 0.0


@dataclass(frozen=True)
class Weighted:
    """The mean that ``weighted`` returns. It reuses the memory of the sums in every round."""

    needs = Needs()

    def init(self, weights: Weights) -> Sum:
        """Return empty sums."""
        layout = layout_for(weights)
        if layout.floats and layout.dtype is not None:
            return Sum(Vector(layout))
        form = [
            (name, _FLOAT, place.shape)
            if is_float(place.dtype)
            else (name, _INTEGER, (2, place.size))
            for name, place in layout.places.items()
        ]
        return Sum(layout_of_signature(tuple(form)).empty())

    def fold(self, state: Sum, one: Contribution) -> Sum:
        """Add a contribution to the sums, in place.

        Raises:
            ValueError: if there are more than 2**63 - 1 examples in total.
        """
        num_so_far, num_examples = state.num_examples, one.num_examples
        if num_so_far + num_examples > integer_sum.MOST:
            raise ValueError(
                f"too many examples: the sum of {num_so_far} and {num_examples} exceeds the limit "
                f"of {integer_sum.MOST}"
            )
        factor = one.weight * SCALE
        with np.errstate(over="ignore", invalid="ignore"):  # for the gaps between tensors
            for total, values in _side_by_side(state.totals, one.delta):
                if total.dtype == _INTEGER:
                    if not num_so_far:
                        total[...] = 0
                    integer_sum.add_scaled(*_halves(total), values, num_examples)
                elif num_so_far:
                    scaled = values.astype(_FLOAT)  # NumPy would buffer a combined cast: slower
                    scaled *= factor
                    np.add(total, scaled, out=total)
                else:
                    total[...] = values
                    np.multiply(total, factor, out=total)
        return Sum(state.totals, num_so_far + num_examples, state.weight + one.weight)

    def finish(self, state: Sum, weights: Weights) -> tuple[Weights, Sum]:
        """Return the mean delta in float64, in its own memory, and empty sums.

        The mean of integers has a fraction, and is exact up to 2**53.
        """
        count = _counted(state)
        mean = layout_for(weights).empty_as(_FLOAT)
        with np.errstate(over="ignore", invalid="ignore"):
            for total, result in _side_by_side(state.totals, mean):
                if total.dtype == _INTEGER:
                    result[:] = integer_sum.mean(*_halves(total), count)
                else:
                    np.divide(total, state.weight * SCALE, out=result)
        return mean, Sum(state.totals)

    def replaced(self, state: Sum, weights: Weights) -> tuple[Tensors, Sum]:
        """Return ``weights`` plus the mean delta, rounded once, and empty sums.

        For floats, the result is bit for bit that of ``finish`` and ``apply_delta``, in fewer
        passes; for integers, it is exact.
        """
        count = _counted(state)
        layout = layout_for(weights)
        if isinstance(state.totals, Vector):
            averaged = layout.over(state.totals.memory.data)
            emptied = Sum(Vector(layout, state.totals.rest))
        else:
            averaged, emptied = layout.empty(), Sum(state.totals)
        for total, base, result in _side_by_side(state.totals, weights, averaged):
            if total.dtype == _INTEGER:
                result[:] = integer_sum.rounded_mean(*_halves(total), count, base)
            else:
                _average(result, total, base, state.weight * SCALE)
        assert averaged.memory is not None
        layout.clear_gaps(averaged.memory)  # bytes from the gaps of updates must not travel on
        return averaged, emptied


def weighted() -> Weighted:
    """Return the mean weighted by numbers of examples."""
    return Weighted()


def apply_delta(weights: Weights, delta: Weights) -> Tensors:
    """Return ``weights + delta``, rounded once to the dtypes of ``weights``.

    Values saturate at the ends of their dtype; integers are rounded to nearest, halves to even.

    Raises:
        NotFinite: if a tensor of ``delta`` has NaN or infinite values.

    Example:
        >>> apply_delta({"n": np.array([250, 3], np.uint8)}, {"n": np.array([9.0, -1.4])})["n"]
        array([255,   2], dtype=uint8)
    """
    check_finite(delta)
    new = layout_for(weights).empty()
    for result, base, change in in_blocks(new, weights, delta):
        exact = change.astype(np.float64)
        if is_float(base.dtype):
            _average(result, exact, base, 1.0)
        else:
            result[:] = integer_sum.moved(base, exact)
    return new


def _counted(state: Sum) -> int:
    if state.num_examples <= 0:
        raise ValueError("there is nothing to average, because no examples have been added")
    if not state.weight * SCALE > 0:
        raise ValueError(
            f"the averaging weights of the updates add up to {state.weight:g}, so the updates have "
            "no mean; check the discounts of the schedule"
        )
    return state.num_examples


def _side_by_side(totals: Vector | Tensors, *others: Weights) -> Iterator[tuple[Array, ...]]:
    """Yield corresponding blocks, the sums first: of each tensor, or of all as one vector."""
    if isinstance(totals, Vector):
        layout = totals.layout
        yield from _cut_alike((totals.first, totals.rest), *(_vectors(o, layout) for o in others))
    else:
        for name, total in totals.items():
            sums = total if total.dtype == _INTEGER else total.reshape(-1)
            yield from cut(sums, *(other[name].reshape(-1) for other in others))


def _halves(total: Array) -> tuple[Array, Array]:
    return total[0], total[1].view(np.uint64)


def _vectors(weights: Weights, layout: Layout) -> Iterable[Array]:
    """Return vectors that together make up the payload of ``layout``."""
    if isinstance(weights, Tensors) and weights.layout is layout and weights.flat is not None:
        return (weights.flat,)
    if isinstance(weights, InPieces) and weights.layout is layout:
        return weights.vectors()
    return _one_by_one(weights, layout)


def _one_by_one(weights: Weights, layout: Layout) -> Iterator[Array]:
    assert layout.dtype is not None
    end = 0
    for name, place in layout.places.items():
        begin = place.offset // layout.dtype.itemsize
        yield np.zeros(begin - end, layout.dtype)
        yield weights[name].reshape(-1)
        end = begin + place.size


def _cut_alike(*several: Iterable[Array]) -> Iterator[tuple[Array, ...]]:
    """Cut vectors in pieces, of equal total length, into blocks that have the same sizes.

    >>> [a.size for a, _ in _cut_alike([np.ones(5), np.ones(2)], [np.ones(3), np.ones(4)])]
    [3, 2, 2]
    """
    remaining = [filter(len, pieces) for pieces in several]
    heads = [next(pieces, _NOTHING) for pieces in remaining]
    while size := min(BLOCK, *map(len, heads)):
        yield tuple([head[:size] for head in heads])
        heads = [
            head[size:] if len(head) > size else next(pieces, _NOTHING)
            for head, pieces in zip(heads, remaining, strict=True)
        ]


def _average(result: Array, total: Array, base: Array, count: float) -> None:
    """Write ``base + total / count``, a block, into ``result``, which may overlap ``total``."""
    end = largest(base.dtype)
    narrow = base.dtype.itemsize < total.dtype.itemsize
    # Values saturate, both at the ends of float64 and at those of the dtype.
    with np.errstate(over="raise" if narrow else "ignore", invalid="ignore"):
        mean = total / count
        if not narrow:
            np.clip(mean, -end, end, out=mean)  # a rounding error may have made it infinite
        mean += base
        if narrow and base.dtype != BFLOAT16:  # a cast to bfloat16 does not report an overflow
            try:
                result[...] = mean
                return
            except FloatingPointError:  # a value overflows the dtype
                pass
        np.clip(mean, -end, end, out=mean)
        result[...] = mean
