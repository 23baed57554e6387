"""Exact sums and means of 64-bit integers, without rounding or overflow.

A weighted sum of 64-bit integers needs up to 126 bits; float64 is exact up to 53. So a sum is two
vectors, the upper and the lower 64 bits of each value, in two's complement.

Example:
    >>> high, low = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    >>> add_scaled(high, low, np.array([2**62 + 1]), 10**12)
    >>> add_scaled(high, low, np.array([2**62 + 3]), 10**12)
    >>> rounded_mean(high, low, 2 * 10**12, np.array([-1]))[0] == 2**62 + 1
    np.True_
"""

from __future__ import annotations

import numpy as np

from fluffle_common.tensors.weights import Array

MOST = 2**63 - 1  # the largest factor and the largest count

_HALF = np.uint64(32)
_LOWER_HALF = np.uint64(2**32 - 1)
_STEP_END = float(2**63 - 1024)  # the largest float64 that is an int64


def add_scaled(high: Array, low: Array, values: Array, factor: int) -> None:
    """Add ``factor * values``, int64, to a sum, in place; ``factor`` is at most ``MOST``."""
    upper, lower = _product(values, factor)
    low += lower
    high += upper
    high += low < lower  # the carry


def rounded_mean(high: Array, low: Array, count: int, base: Array) -> Array:
    """Return ``base + sum / count``, rounded to the nearest, halves to even.

    ``count`` is from 1 to ``MOST``. ``base`` has integers of any dtype; the result has the same
    dtype, and saturates at its ends.
    """
    total = _whole(high, low)
    quotient, rest = total // count, total % count
    odd = (quotient + base) % 2 == 1
    return _added(base, quotient + ((2 * rest > count) | ((2 * rest == count) & odd)))


def mean(high: Array, low: Array, count: int) -> Array:
    """Return ``sum / count`` in float64.

    >>> high, low = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    >>> add_scaled(high, low, np.array([-3]), 1)
    >>> mean(high, low, 2)
    array([-1.5])
    """
    return (_whole(high, low) / count).astype(np.float64)


def moved(base: Array, change: Array) -> Array:
    """Return ``base + change``, rounded to the nearest, halves to even.

    ``base`` has integers of any dtype; the result has the same dtype, and saturates at its ends.
    ``change`` is float64, finite; magnitudes above about 2**63 have no further effect.

    >>> moved(np.array([3, 4, 250], np.uint8), np.array([0.5, 0.5, 9.0]))
    array([  4,   4, 255], dtype=uint8)
    """
    whole = np.clip(np.floor(change), -_STEP_END, _STEP_END)
    rest = np.clip(change - whole, 0, 1)
    steps = whole.astype(np.int64)
    odd = (steps ^ base.astype(np.int64)) & 1 == 1
    return _added(base, steps + ((rest > 0.5) | ((rest == 0.5) & odd)))


def _product(values: Array, factor: int) -> tuple[Array, Array]:
    """Return the upper and lower halves of 128-bit products (long multiplication by 32 bits)."""
    signed = values.astype(np.int64, copy=False)
    whole = signed.view(np.uint64)
    by_upper, by_lower = np.uint64(factor >> 32), np.uint64(factor & (2**32 - 1))
    upper, lower = whole >> _HALF, whole & _LOWER_HALF
    first = lower * by_lower
    second = upper * by_lower + (first >> _HALF)
    third = lower * by_upper + (second & _LOWER_HALF)
    high = upper * by_upper + (second >> _HALF) + (third >> _HALF)
    low = (third << _HALF) | (first & _LOWER_HALF)
    # A negative value was read as 2**64 more than it is.
    return high.view(np.int64) - np.where(signed < 0, factor, 0), low


def _whole(high: Array, low: Array) -> Array:
    """Return sums as Python's integers, of a block at a time, because they take much memory."""
    whole: Array = high.astype(object) * 2**64 + low.astype(object)
    return whole


def _added(base: Array, change: Array) -> Array:
    limits = np.iinfo(base.dtype)
    exact: Array = np.clip(base.astype(object) + change, limits.min, limits.max)
    return exact.astype(base.dtype)
