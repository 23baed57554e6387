"""The sample-weighted mean of a round, ``sum(n_k * delta_k) / sum(n_k)``, exact where it can be.

Floats are summed in float64. A model whose tensors are all of one dtype, and lie in one piece, is
summed as one vector, however many tensors it has. Integers are summed in 128 bits.

Example:
    >>> base = {"w": np.zeros(2, np.float32)}
    >>> mean = weighted()
    >>> state = mean.init(base)
    >>> for learnt, n in (([1, 2], 1), ([4, 8], 2)):
    ...     delta = {"w": np.array(learnt, np.float32)}
    ...     state = mean.fold(state, Contribution(worker="a", num_examples=n, delta=delta))
    >>> delta, state = mean.finish(state, base)
    >>> delta["w"], state.num_examples
    (array([3., 6.]), 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.layout import Tensors, layout_for, layout_of_signature
from fluffle_common.tensors.weights import (
    BFLOAT16,
    Array,
    Weights,
    check_finite,
    is_float,
    largest,
)
from fluffle_coordinator.strategy import integer_sum
from fluffle_coordinator.strategy.base import NO_NEEDS, Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks

# Elements handled at a time: a block of float64 and the slices it is added to stay in cache.
_BLOCK = 32 * 1024
# Sums are kept smaller by this, which costs no bit: two updates of 1e308 have no sum in float64,
# and they have an average. Only what is below 1e-288 is rounded by it, to a multiple of 1e-304.
_SCALE = 2.0**-64
_FLOAT, _INTEGER = np.dtype(np.float64), np.dtype(np.int64)


@dataclass(frozen=True)
class Sum:
    """The running sum of a round: sum(n_k * delta_k), and sum(n_k).

    As long as that is 0, ``totals`` are memory for it and nothing else. Of floats they are the sums
    in float64, times ``_SCALE``; of integers the upper halves of the sums, and behind them the
    lower halves (see ``integer_sum``).
    """

    totals: Tensors
    num_examples: int = 0


@dataclass(frozen=True)
class Weighted:
    """The mean that ``weighted`` makes. It reuses the memory of one sum in all rounds."""

    needs: Needs = NO_NEEDS

    def init(self, weights: Weights) -> Sum:
        """Return an empty sum."""
        layout = layout_for(weights)
        if layout.floats:
            return Sum(layout.empty_as(_FLOAT))
        form = [
            (name, _FLOAT, place.shape)
            if is_float(place.dtype)
            else (name, _INTEGER, (2, place.size))
            for name, place in layout.places.items()
        ]
        return Sum(layout_of_signature(tuple(form)).empty())

    def fold(self, state: Sum, one: Contribution) -> Sum:
        """Add a contribution to the sum, in place.

        Raises:
            ValueError: for more than 2**63 - 1 examples in all.
        """
        num_so_far, num_examples = state.num_examples, one.num_examples
        if num_so_far + num_examples > integer_sum.MOST:
            raise ValueError(
                f"{num_so_far} and {num_examples} examples are more than can be counted"
            )
        add = _add_scaled if num_so_far else _set_scaled
        with np.errstate(over="ignore", invalid="ignore"):  # of what lies between the tensors
            for total, values in _side_by_side(state.totals, one.delta):
                if total.dtype == _INTEGER:
                    _add_integers(total, values, num_examples, anew=not num_so_far)
                else:
                    add(total, values, num_examples * _SCALE)
        return Sum(state.totals, num_so_far + num_examples)

    def finish(self, state: Sum, weights: Weights) -> tuple[Weights, Sum]:
        """Return the mean delta in float64, in memory of its own, and an empty sum.

        The mean of integers keeps its fraction, and is exact up to 2**53.
        """
        count = _counted(state)
        mean = layout_for(weights).empty_as(_FLOAT)
        with np.errstate(over="ignore", invalid="ignore"):
            for total, result in _side_by_side(state.totals, mean):
                if total.dtype == _INTEGER:
                    result[:] = integer_sum.mean(*_halves(total), count)
                else:
                    np.divide(total, count * _SCALE, out=result)
        return mean, Sum(state.totals)

    def replaced(self, state: Sum, weights: Weights) -> tuple[Tensors, Sum]:
        """Return ``weights`` plus the mean delta, rounded once, and an empty sum.

        For floats this is bit by bit what ``apply_delta`` makes of ``finish``, in fewer passes;
        integers are exact.
        """
        count = _counted(state)
        layout = layout_for(weights)
        averaged = layout.empty()
        for total, base, result in _side_by_side(state.totals, weights, averaged):
            if is_float(base.dtype):
                _average(result, total, base, count * _SCALE)
            else:
                _average_integers(result, total, base, count)
        assert averaged.memory is not None
        layout.clear_gaps(averaged.memory)  # what updates had there goes no further
        return averaged, Sum(state.totals)


def weighted() -> Weighted:
    """Average contributions by their numbers of examples."""
    return Weighted()


def apply_delta(weights: Weights, delta: Weights) -> Tensors:
    """Return ``weights + delta``, rounded once to the dtypes of ``weights``.

    Args:
        weights: the model.
        delta: what to add to each tensor, floats of any dtype; float64 loses nothing on the way.

    Returns:
        New weights. What is beyond the end of a dtype is its end; integers are rounded to the
        nearest, halves to even.

    Raises:
        NotFinite: naming the first tensor of ``delta`` that holds NaN or an infinity.

    Example:
        >>> apply_delta({"n": np.array([250, 3], np.uint8)}, {"n": np.array([9.0, -1.4])})["n"]
        array([255,   2], dtype=uint8)
    """
    check_finite(delta)
    moved = layout_for(weights).empty()
    for result, base, change in in_blocks(moved, weights, delta):
        exact = change.astype(np.float64)
        if is_float(base.dtype):
            _average(result, exact, base, 1.0)
        else:
            result[:] = integer_sum.moved(base, exact)
    return moved


def _counted(state: Sum) -> int:
    if state.num_examples <= 0:
        raise ValueError("no examples were folded: there is nothing to average")
    return state.num_examples


def _side_by_side(totals: Tensors, *others: Weights) -> Iterator[tuple[Array, ...]]:
    """Yield what belongs together, as vectors: tensor by tensor, or everything in one piece."""
    flat = [
        other.flat
        for other in (totals, *others)
        if isinstance(other, Tensors) and other.layout is totals.layout and other.flat is not None
    ]
    if len(flat) == 1 + len(others):
        yield tuple(flat)
    else:
        for name, total in totals.items():
            yield total.reshape(-1), *(other[name].reshape(-1) for other in others)


def _set_scaled(total: Array, values: Array, factor: float) -> None:
    """Write ``factor * values`` into ``total``, in float64; what was there need not be read."""
    for start in range(0, total.size, _BLOCK):
        part = total[start : start + _BLOCK]
        part[...] = values[start : start + _BLOCK]
        part *= factor


def _add_scaled(total: Array, values: Array, factor: float) -> None:
    """Add ``factor * values`` to ``total``, in place and in float64, a block at a time.

    A block is cast before it is multiplied: one step with both buffers its input, and is slower.
    """
    block = np.empty(min(_BLOCK, total.size), np.float64)
    for start in range(0, total.size, _BLOCK):
        part = total[start : start + _BLOCK]
        scaled = block[: part.size]
        scaled[...] = values[start : start + _BLOCK]
        scaled *= factor
        part += scaled


def _add_integers(total: Array, values: Array, factor: int, *, anew: bool) -> None:
    """Add ``factor * values`` to the sums of a tensor of integers, in place."""
    if anew:
        total[:] = 0
    high, low = _halves(total)
    for start in range(0, values.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        integer_sum.add_scaled(high[block], low[block], values[block], factor)


def _halves(total: Array) -> tuple[Array, Array]:
    return total[: total.size // 2], total[total.size // 2 :].view(np.uint64)


def _average(result: Array, total: Array, base: Array, count: float) -> None:
    """Write ``base + total / count`` into ``result``, in blocks; uses ``total`` up.

    A page that was never touched is slow to touch: so the sum's memory serves all rounds.
    """
    end = largest(base.dtype)
    narrow = base.dtype.itemsize < total.dtype.itemsize
    # What is beyond the end of float64 is clipped to its end, as is what the dtype cannot hold.
    with np.errstate(over="raise" if narrow else "ignore", invalid="ignore"):
        for start in range(0, total.size, _BLOCK):
            mean, part = total[start : start + _BLOCK], result[start : start + _BLOCK]
            mean /= count
            if not narrow:
                np.clip(mean, -end, end, out=mean)  # it may be beyond by a rounding
            mean += base[start : start + _BLOCK]
            if narrow:
                try:
                    part[...] = mean if base.dtype != BFLOAT16 else _for_bfloat16(mean)
                    continue
                except FloatingPointError:  # the cast met a value that the dtype cannot hold
                    pass
            np.clip(mean, -end, end, out=mean)
            part[...] = mean


def _for_bfloat16(values: Array) -> Array:
    """Round float64 so that rounding once more, to bfloat16, gives the nearest.

    The cast goes by way of float32: what lands there in the middle between two of bfloat16, and was
    not in the middle, would then go to the even one.
    """
    rounded = values.astype(np.float32)
    bits = rounded.view(np.uint32)
    (middle,) = np.nonzero((bits & 0xFFFF) == 0x8000)
    if middle.size:
        exact, there = values[middle], rounded[middle]
        towards = np.where(exact > there, np.float32(np.inf), np.float32(-np.inf))
        rounded[middle] = np.where(exact == there, there, np.nextafter(there, towards))
    return rounded


def _average_integers(result: Array, total: Array, base: Array, num_examples: int) -> None:
    """Write ``base + total / num_examples`` into ``result``, rounded once, in blocks."""
    high, low = _halves(total)
    for start in range(0, base.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        result[block] = integer_sum.rounded_mean(high[block], low[block], num_examples, base[block])
