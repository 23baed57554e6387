"""Named tensors, and the arithmetic both sides must agree on.

Weights are a mapping from a path (``"conv1/kernel"``) to a NumPy array. What travels from a worker
is not the trained weights but the *delta*, trained - received: the pseudo-gradient that server
optimizers, clipping and compression all want (Reddi et al., "Adaptive Federated Optimization",
ICLR 2021, section 2).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from fluffle_common.tensors.layout import (
    BFLOAT16,
    DTYPES,
    FLOATS,
    INTEGERS,
    Array,
    Layout,
    Signature,
    Tensors,
    Weights,
    check_signature,
    is_float,
    largest,
    layout_for,
    layout_of_signature,
    signature_of,
)
from fluffle_common.tensors.pieces import InPieces

__all__ = [
    "BFLOAT16",
    "DTYPES",
    "FLOATS",
    "INTEGERS",
    "Array",
    "Weights",
    "check_signature",
    "is_float",
    "largest",
]

# A larger piece of memory goes back to the system, and is slow to touch when it comes again.
_ONE_PIECE_BYTES = 16 * 2**20


# So many values are looked at at a time: a block of rows, each squared by itself. With rows of more
# than 10,000, BLAS wakes up threads of its own.
_ROW = 4 * 1024
_BLOCK = 64 * _ROW
# A smaller sum of squares may have lost what was too small to be squared as a float32.
_SURE = 1e-20


class NotFinite(ValueError):
    """A tensor holds NaN or an infinity."""


def delta_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which a delta of ``dtype`` travels.

    Floats keep their own; a difference of integers of any width needs a sign, so it is int64.

    Example:
        >>> delta_dtype(np.dtype("uint8"))
        dtype('int64')
    """
    return np.dtype(np.int64) if dtype.kind in "iu" else dtype


def delta_signature(weights: Weights) -> Signature:
    """Return the names, dtypes and shapes that a delta of these weights has."""
    return tuple([(name, delta_dtype(t.dtype), t.shape) for name, t in weights.items()])


def delta(trained: Weights, received: Weights) -> Weights:
    """Subtract what was received from what was trained, tensor by tensor.

    Args:
        trained: the weights after the local epochs; same names, shapes and dtypes as ``received``.
        received: the global weights of the round.

    Returns:
        trained - received, in ``delta_dtype`` of each tensor; in one piece, unless that is large.

    Raises:
        ValueError: where names, shapes or dtypes differ, or a difference of 64-bit integers does
            not fit into 64 bits.
    """
    base = as_dict(received)
    layout = layout_for(received)
    if signature_of(trained) != layout.signature:  # perhaps only in another order
        same_form(trained, base)
    if not layout.floats:
        layout = layout_of_signature(delta_signature(base))
    if layout.nbytes > _ONE_PIECE_BYTES:
        return {name: _subtract(name, trained[name], old) for name, old in base.items()}
    found = layout.empty()
    for name, into in found.as_dict.items():
        _subtract(name, trained[name], base[name], into)
    return found


def _subtract(name: str, new: Array, old: Array, into: Array | None = None) -> Array:
    dtype = delta_dtype(old.dtype)
    found: Array = np.subtract(new, old, out=into, dtype=dtype)
    # Of 64-bit integers at opposite ends the difference wraps, and has the other sign.
    if is_float(dtype) or old.dtype.itemsize < dtype.itemsize:
        return found
    if ((new >= old) != (found >= 0)).any():
        raise ValueError(
            f"tensor '{name}' changed by more than an int64 can hold; "
            "keep it out of the weights, or use integers of 32 bits"
        )
    return found


def as_dict(weights: Weights) -> dict[str, Array]:
    """Return tensors in a mapping that is the caller's own."""
    return dict(weights.as_dict if isinstance(weights, Tensors) else weights)


def same_form(weights: Weights, like: Weights) -> None:
    """Check that two sets of weights have the same names, shapes and dtypes.

    Raises:
        ValueError: naming the first tensor that differs, and how.
    """
    _same_names(weights, like)
    for name, expected in like.items():
        _same_tensor(name, weights[name], expected.shape, expected.dtype)


def check_delta(update: Weights, base: Weights) -> float:
    """Check that ``update`` is a delta for ``base``: names, shapes, dtypes, and finite everywhere.

    Nothing is broadcast: a shape of (1,) is not a shape of ().

    Returns:
        Its norm, as ``finite_norm`` does.

    Raises:
        NotFinite: naming the first tensor that holds NaN or an infinity.
        ValueError: naming the first tensor that differs, and how.
    """
    if isinstance(update, InPieces) and update.layout is layout_for(base):
        return _norm_of_pieces(update)
    if not _same_layout(update, base):
        _same_names(update, base)
        for name, expected in base.items():
            _same_tensor(name, update[name], expected.shape, delta_dtype(expected.dtype))
    return finite_norm(update)


def _same_layout(update: Weights, base: Weights) -> bool:
    """Whether they are known to be of the same form, all floats, without a closer look."""
    if not isinstance(update, Tensors) or not isinstance(base, Tensors):
        return False
    return update.layout is base.layout and base.layout.floats


def check_finite(weights: Weights) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        NotFinite: naming the first tensor that holds NaN or an infinity.
    """
    flat = weights.flat if isinstance(weights, Tensors) else None
    if flat is not None and not _infinite(flat):  # what lies between tensors may be anything
        return
    for name, tensor in weights.items():
        if bad := _infinite(tensor.reshape(-1)):
            raise _not_finite(name, bad)


def finite_norm(weights: Weights) -> float:
    """Return the Euclidean norm of all values, integers too, which must be finite.

    It is good to a millionth, and the largest float64 where it is beyond that.

    Raises:
        NotFinite: naming the first tensor that holds NaN or an infinity.

    Example:
        >>> finite_norm({"w": np.array([3.0, 0.0]), "n": np.array(-4)})
        5.0
    """
    if (
        isinstance(weights, Tensors)
        and weights.layout.floats
        and (flat := weights.flat) is not None
    ):
        # What lies between tensors may be anything; here it is 0, unless someone is up to no good.
        if weights.layout.zero_between(flat):
            norm, bad = _measure(flat)
            if not bad:
                return min(norm, sys.float_info.max)
    norm = 0.0
    for name, tensor in weights.items():
        part, bad = _measure(tensor.reshape(-1))
        if bad:
            raise _not_finite(name, bad)
        norm = math.hypot(norm, part)
    return min(norm, sys.float_info.max)


def norm_of_piece(layout: Layout, vector: Array, start: int) -> float | None:
    """Return the norm of a piece of all tensors, from the element ``start`` on.

    None where not all of it is finite, or where it is not known to be 0 between the tensors: then
    each tensor has to be looked at.
    """
    norm, bad = _measure(vector)
    return None if bad or not layout.zero_between(vector, start) else norm


def _norm_of_pieces(update: InPieces) -> float:
    """Do what ``finite_norm`` does, without putting the pieces together."""
    if update.norm is not None:
        return update.norm
    norm, found = 0.0, dict.fromkeys(update, 0)
    for name, values in update.by_tensor():
        part, bad = _measure(values)
        norm, found[name] = math.hypot(norm, part), found[name] + bad
    for name, bad in found.items():
        if bad:
            raise _not_finite(name, bad)
    return min(norm, sys.float_info.max)


def _not_finite(name: str, bad: int) -> NotFinite:
    return NotFinite(f"tensor '{name}' has {bad} values that are NaN or infinite")


def _infinite(values: Array) -> int:
    """Count what is NaN or infinite, a block at a time."""
    if not is_float(values.dtype):
        return 0
    found = 0
    for start in range(0, values.size, _BLOCK):
        finite = np.isfinite(values[start : start + _BLOCK])
        if not np.logical_and.reduce(finite):
            found += int(finite.size - np.count_nonzero(finite))
    return found


def _measure(values: Array) -> tuple[float, int]:
    """Return the norm of the finite values of a vector, and how many are not finite."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = sum(float(np.vecdot(rows, rows).sum(dtype=np.float64)) for rows in _rows(values))
        if _SURE < squares < math.inf:  # so all are finite
            return math.sqrt(squares), 0
        norm, bad = 0.0, 0
        for rows in _rows(values):
            for row in rows if rows.any() else ():
                part, infinite = _measure_closely(row)
                norm, bad = math.hypot(norm, part), bad + infinite
    return norm, bad


def _rows(values: Array) -> Iterator[Array]:
    """Yield the values of a vector in rows of which each can be squared and added up by itself."""
    wide = _wide(values.dtype)
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK].astype(wide, copy=False)
        whole = block.size - block.size % _ROW
        if whole:
            yield block[:whole].reshape(-1, _ROW)
        if whole < block.size:
            yield block[whole:].reshape(1, -1)


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which the values of one are squared."""
    if not is_float(dtype):
        return np.dtype(np.float64)
    return np.dtype(np.float32) if dtype.itemsize < np.dtype(np.float32).itemsize else dtype


def _measure_closely(row: Array) -> tuple[float, int]:
    """Do what ``_measure`` does, whatever the squares of a row would be."""
    if not row.any():
        return 0.0, 0
    finite = row[np.isfinite(row)].astype(np.float64)
    highest = float(np.abs(finite).max(initial=0))
    if not highest:
        return 0.0, row.size - finite.size
    finite /= highest
    return highest * math.sqrt(float(np.vecdot(finite, finite))), row.size - finite.size


def size_bytes(weights: Weights) -> int:
    """Return the number of bytes of all tensors together."""
    if isinstance(weights, Tensors) and weights.memory is not None:
        return len(weights.memory)
    return sum(tensor.nbytes for tensor in weights.values())


def _same_names(weights: Weights, like: Weights) -> None:
    if weights.keys() == like.keys():
        return
    missing = sorted(like.keys() - weights.keys())
    extra = sorted(weights.keys() - like.keys())
    told = [
        f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", extra))
        if names
    ]
    raise ValueError(f"tensor names differ from the model's: {'; '.join(told)}")


def _same_tensor(name: str, tensor: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"tensor '{name}' has shape {tensor.shape}, the model has {shape}")
    if tensor.dtype != dtype and tensor.dtype.newbyteorder("=") != dtype:
        raise ValueError(f"tensor '{name}' is {tensor.dtype}, expected {dtype}")
