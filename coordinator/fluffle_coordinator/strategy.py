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

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluffle_common.layout import Tensors, layout_for
from fluffle_common.weights import BFLOAT16, Array, Weights, is_float, largest

# Elements handled at a time: a block of float64 and the slices it is added to stay in cache.
_BLOCK = 32 * 1024


@dataclass(frozen=True)
class Sum:
    """The running sum of a round: sum(n_k * delta_k) in float64, and sum(n_k).

    As long as that is 0, ``totals`` are memory for it and nothing else.
    """

    totals: Tensors
    num_examples: int = 0


@dataclass(frozen=True)
class Strategy:
    """How a round is averaged.

    Args:
        init: ``(weights) -> state``, at the opening of a round.
        fold: ``(state, delta, num_examples) -> state``; may reuse the old state's memory. The delta
            has been checked against the weights (``weights.check_delta``).
        finish: ``(state, weights) -> (weights, state)``: the next round's weights, in the dtypes of
            the old, and the state to begin that round with, which may be the old state's memory.
    """

    init: Callable[[Weights], Sum]
    fold: Callable[[Sum, Weights, int], Sum]
    finish: Callable[[Sum, Weights], tuple[Tensors, Sum]]


def _init(weights: Weights) -> Sum:
    return Sum(layout_for(weights).empty_as(np.dtype(np.float64)))


def _fold(state: Sum, delta: Weights, num_examples: int) -> Sum:
    add = _add_scaled if state.num_examples else _set_scaled
    with np.errstate(over="ignore", invalid="ignore"):  # of what lies between the tensors
        for total, values in _side_by_side(state.totals, delta):
            add(total, values, float(num_examples))
    return Sum(state.totals, state.num_examples + num_examples)


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


def _finish(state: Sum, weights: Weights) -> tuple[Tensors, Sum]:
    if state.num_examples <= 0:
        raise ValueError("no examples were folded: there is nothing to average")
    layout = layout_for(weights)
    averaged = layout.empty()
    for total, base, result in _side_by_side(state.totals, weights, averaged):
        _average(result, total, base, state.num_examples)
    assert averaged.memory is not None
    layout.clear_gaps(averaged.memory)  # what updates had there goes no further
    return averaged, Sum(state.totals)


def _average(result: Array, total: Array, base: Array, num_examples: int) -> None:
    """Write ``base + total / num_examples`` into ``result``, in blocks; uses ``total`` up.

    A page that was never touched is slow to touch: so the sum's memory serves all rounds.
    """
    lowest, highest = _limits(base.dtype)
    narrow = is_float(base.dtype) and base.dtype.itemsize < total.dtype.itemsize
    # What is beyond the end of float64 is clipped to its end, as is what the dtype cannot hold.
    with np.errstate(over="raise" if narrow else "ignore", invalid="ignore"):
        for start in range(0, total.size, _BLOCK):
            mean, part = total[start : start + _BLOCK], result[start : start + _BLOCK]
            mean /= num_examples
            mean += base[start : start + _BLOCK]
            if narrow:
                try:
                    part[...] = mean if base.dtype != BFLOAT16 else _for_bfloat16(mean)
                    continue
                except FloatingPointError:  # the cast met a value that the dtype cannot hold
                    pass
            elif base.dtype.kind in "iu":
                np.rint(mean, out=mean)
            np.clip(mean, lowest, highest, out=mean)
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


@functools.cache
def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the ends of a dtype: between them, no value wraps or becomes infinite when cast."""
    if is_float(dtype):
        return -largest(dtype), largest(dtype)
    limits = np.iinfo(dtype)
    lowest, highest = float(limits.min), float(limits.max)
    if highest > limits.max:  # 2**63 - 1 as a float is 2**63
        highest = float(np.nextafter(highest, 0))
    return lowest, highest


fedavg = Strategy(_init, _fold, _finish)
"""The sample-weighted average, sum(n_k * w_k) / sum(n_k), accumulated in float64.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, algorithm 1, on deltas: w + sum(n_k * (w_k - w)) / sum(n_k). Integer tensors are
averaged likewise and rounded to the nearest (half to even).
"""
