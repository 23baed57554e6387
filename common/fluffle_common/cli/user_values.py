"""Conversion of the numbers that users' code returns, whatever its framework."""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any

import numpy as np

from fluffle_common.user_errors import sendable


def real(value: Any) -> float:
    """Convert a number of any framework to a float.

    Raises:
        ValueError: if it is none; the error, such as ``'a'; expected a number``, shows the value.
    """
    try:
        return float(_plain(value))
    except OverflowError:
        raise ValueError(f"{shown(value)}, which is too large") from None
    except Exception:
        raise ValueError(f"{shown(value)}; expected a number") from None


def number(value: Any) -> float:
    """Convert a finite number as ``real`` does."""
    converted = real(value)
    if not math.isfinite(converted):
        raise ValueError(f"{converted}; expected a finite number")
    return converted


def count(value: Any) -> int:
    """Convert a whole number to an int, as ``real`` does."""
    try:
        plain = _plain(value)
        if isinstance(plain, float) and plain.is_integer():
            return int(plain)
        return operator.index(plain)
    except Exception:
        raise ValueError(f"{shown(value)}; expected a whole number") from None


def shown(value: Any) -> str:
    """Return how errors show a value of a user's code: in one line of at most 80 characters."""
    try:
        return sendable(" ".join(reprlib.repr(value).split()), 80)
    except Exception:  # its own __repr__ fails, or it is a number of thousands of digits
        return f"an unprintable {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Return the element of a one-element array or tensor; return other values as they are."""
    if np.ma.is_masked(value):  # ``item`` would return the value under the mask
        raise TypeError
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, str | bytes | bytearray):  # which ``float`` would parse
        raise TypeError
    return plain
