"""How updates become the next weights: pure functions over arrays.

A strategy is a frozen triple: ``init`` makes the running state of a round, ``fold`` takes one
update into it, ``finish`` turns it into the next weights. Updates are folded one at a time, so that
memory does not grow with the number of workers.

Example:
    >>> base = {"w": np.zeros(2, np.float32)}
    >>> state = fedavg.init(base)
    >>> state = fedavg.fold(state, {"w": np.array([1, 2], np.float32)}, 1)
    >>> state = fedavg.fold(state, {"w": np.array([4, 8], np.float32)}, 2)
    >>> weights, state = fedavg.finish(state, base)
    >>> weights["w"], state.num_examples
    (array([3., 6.], dtype=float32), 0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fluffle_common.tensors.layout import Tensors, layout_for, layout_of_signature
from fluffle_common.tensors.weights import BFLOAT16, Array, Weights, is_float, largest
from fluffle_coordinator.strategy import integer_sum

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
class Strategy:
    """How a round is averaged.

    Args:
        init: ``(weights) -> state``, at the opening of a round.
        fold: ``(state, delta, num_examples) -> state``; may reuse the old state's memory. The delta
            has been checked against the weights (``weights.check_delta``). Raises ``ValueError``
            for more than 2**63 - 1 examples in all.
        finish: ``(state, weights) -> (weights, state)``: the next round's weights, in the dtypes of
            the old, and the state to begin that round with, which may be the old state's memory.
    """

    init: Callable[[Weights], Sum]
    fold: Callable[[Sum, Weights, int], Sum]
    finish: Callable[[Sum, Weights], tuple[Tensors, Sum]]


def _init(weights: Weights) -> Sum:
    layout = layout_for(weights)
    if layout.floats:
        return Sum(layout.empty_as(_FLOAT))
    form = [
        (name, _FLOAT, place.shape) if is_float(place.dtype) else (name, _INTEGER, (2, place.size))
        for name, place in layout.places.items()
    ]
    return Sum(layout_of_signature(tuple(form)).empty())


def _fold(state: Sum, delta: Weights, num_examples: int) -> Sum:
    num_so_far = state.num_examples
    if num_so_far + num_examples > integer_sum.MOST:
        raise ValueError(f"{num_so_far} and {num_examples} examples are more than can be counted")
    add = _add_scaled if num_so_far else _set_scaled
    with np.errstate(over="ignore", invalid="ignore"):  # of what lies between the tensors
        for total, values in _side_by_side(state.totals, delta):
            if total.dtype == _INTEGER:
                _add_integers(total, values, num_examples, anew=not num_so_far)
            else:
                add(total, values, num_examples * _SCALE)
    return Sum(state.totals, num_so_far + num_examples)


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


def _finish(state: Sum, weights: Weights) -> tuple[Tensors, Sum]:
    if state.num_examples <= 0:
        raise ValueError("no examples were folded: there is nothing to average")
    layout = layout_for(weights)
    averaged = layout.empty()
    for total, base, result in _side_by_side(state.totals, weights, averaged):
        average = _average if is_float(base.dtype) else _average_integers
        average(result, total, base, state.num_examples)
    assert averaged.memory is not None
    layout.clear_gaps(averaged.memory)  # what updates had there goes no further
    return averaged, Sum(state.totals)


def _average(result: Array, total: Array, base: Array, num_examples: int) -> None:
    """Write ``base + total / num_examples`` into ``result``, in blocks; uses ``total`` up.

    A page that was never touched is slow to touch: so the sum's memory serves all rounds.
    """
    end, count = largest(base.dtype), num_examples * _SCALE
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


fedavg = Strategy(_init, _fold, _finish)
"""The sample-weighted average, sum(n_k * w_k) / sum(n_k), accumulated in float64.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, algorithm 1, on deltas: w + sum(n_k * (w_k - w)) / sum(n_k). Integer tensors are
averaged exactly and rounded to the nearest (half to even). Finite updates make a finite model: what
is beyond the end of a dtype is its end.
"""
