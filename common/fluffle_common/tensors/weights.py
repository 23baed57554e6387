"""Weights and deltas: subtraction, comparison of shapes, checks for finite values, and norms.

Weights map a path (``"conv1/kernel"``) to a NumPy array. Workers send the *delta*, trained minus
received weights. It is the pseudo-gradient on which server optimizers, clipping and compression
work (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, section 2).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from fluffle_common.tensors.in_pieces import InPieces
from fluffle_common.tensors.layout import (
    BFLOAT16,
    DTYPES,
    FLOATS,
    INTEGERS,
    Array,
    Forms,
    Layout,
    Place,
    Tensors,
    Weights,
    check_signature,
    is_float,
    largest,
    layout_for,
    layout_of_signature,
    signature_of,
)

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

# malloc returns larger buffers to the system, and touching fresh pages is slow.
_MAX_BUFFER_BYTES = 16 * 2**20
# Norms are computed in blocks of rows. BLAS starts threads for rows of more than 10,000 values.
_ROW = 4 * 1024
_BLOCK = 64 * _ROW
# A smaller sum of squares may lack values whose squares underflowed in float32.
_MIN_EXACT = 1e-20


class NotFinite(ValueError):
    """A tensor holds NaN or an infinity."""


def delta_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a delta of weights in ``dtype``: int64 for integers, else ``dtype``.

    Example:
        >>> delta_dtype(np.dtype("uint8"))
        dtype('int64')
    """
    return np.dtype(np.int64) if dtype.kind in "iu" else dtype


def delta(trained: Weights, received: Weights) -> Weights:
    """Return ``trained - received``, tensor by tensor.

    Each tensor has its ``delta_dtype``; all are in one buffer if that is at most 16 MiB.

    Raises:
        ValueError: if names, shapes or dtypes differ, or a dtype cannot hold a difference.
    """
    layout = layout_for(received)
    if signature_of(trained) != layout.signature:  # the order may differ
        same_form(trained, received)
    if not layout.floats:
        layout = layout_of_signature(
            tuple([(name, delta_dtype(t.dtype), t.shape) for name, t in received.items()])
        )
    difference: Weights
    if layout.nbytes > _MAX_BUFFER_BYTES:
        difference = {n: np.empty(p.shape, p.dtype) for n, p in layout.places.items()}
    else:
        difference = layout.empty()
    name = ""
    try:
        with np.errstate(over="raise", invalid="ignore"):
            for (name, old), out in zip(received.items(), difference.values(), strict=True):
                np.subtract(trained[name], old, out=out, dtype=out.dtype)
                if out.dtype.kind == "i" and _wrapped(trained[name], old, out):
                    raise ValueError(
                        f"tensor '{name}' changed by more than an int64 can hold; keep this tensor "
                        "out of the weights, or use a smaller dtype, such as int32"
                    )
    except FloatingPointError:  # both weights are finite
        raise ValueError(
            f"tensor '{name}' changed by more than a {received[name].dtype} can hold; the training "
            "may diverge, so lower the learning rate"
        ) from None
    return difference


def _wrapped(new: Array, old: Array, difference: Array) -> bool:
    """Return whether a difference of integers has overflowed, which only one of 64 bits can."""
    return old.itemsize == difference.itemsize and bool(((new >= old) != (difference >= 0)).any())


def read_only(tensor: Array) -> Array:
    """Return a view that cannot be made writeable, as an ordinary view of a writeable array can.

    Example:
        >>> read_only(np.zeros(3)).flags.writeable = True
        Traceback (most recent call last):
            ...
        ValueError: cannot set WRITEABLE flag to True of this array
    """
    values = tensor.reshape(-1).view(np.uint8).data.toreadonly()
    return np.asarray(values).view(tensor.dtype).reshape(tensor.shape)


def same_form(weights: Weights, like: Weights) -> None:
    """Raise ``ValueError``, naming a tensor, unless names, shapes and dtypes are the same."""
    _check_names(weights, like)
    for name, expected in like.items():
        _check_tensor(name, weights[name], expected.shape, expected.dtype)


def check_delta(update: Weights, base: Weights) -> float:
    """Check that ``update`` is a finite delta for ``base``, with exactly its names and shapes.

    Returns:
        The Euclidean norm of the delta, as ``finite_norm`` computes it.

    Raises:
        NotFinite: naming the first tensor that holds NaN or infinity.
        ValueError: naming the first tensor that differs.
    """
    layout = base.layout if isinstance(base, Tensors) and base.layout.floats else None
    if isinstance(update, InPieces) and update.layout is layout_for(base):
        return _norm_of_pieces(update)
    if not isinstance(update, Tensors) or update.layout is not layout:
        check_delta_form(update, base)
    return finite_norm(update)


def check_delta_form(update: Forms, base: Weights) -> None:
    """Raise ``ValueError``, naming a tensor, unless ``update`` has the form of a delta."""
    _check_names(update, base)
    for name, expected in base.items():
        _check_tensor(name, update[name], expected.shape, delta_dtype(expected.dtype))


def check_finite(weights: Weights) -> None:
    """Raise ``NotFinite``, naming a tensor, if a value is NaN or infinite."""
    flat = weights.flat if isinstance(weights, Tensors) else None
    if flat is not None and not _count_not_finite(flat):
        return
    for name, tensor in weights.items():  # flat includes gaps, so check the tensors themselves
        if bad := _count_not_finite(tensor.reshape(-1)):
            raise not_finite(f"tensor '{name}'", bad)


def finite_norm(weights: Weights) -> float:
    """Return the Euclidean norm of all values (floats and integers), which must be finite.

    The relative error is at most about 2e-6. A norm beyond float64 is the largest float64.

    Raises:
        NotFinite: naming the first tensor that holds NaN or infinity.

    Example:
        >>> finite_norm({"w": np.array([3.0, 0.0]), "n": np.array(-4)})
        5.0
    """
    if (
        isinstance(weights, Tensors)
        and weights.layout.floats
        and (flat := weights.flat) is not None
    ):
        # A peer may send any values in the gaps between tensors; normally they are 0.
        if weights.layout.has_zero_gaps(flat):
            norm, bad = _measure(flat)
            if not bad:
                return min(norm, sys.float_info.max)
    norm = 0.0
    for name, tensor in weights.items():
        part, bad = _measure(tensor.reshape(-1))
        if bad:
            raise not_finite(f"tensor '{name}'", bad)
        norm = math.hypot(norm, part)
    return min(norm, sys.float_info.max)


def norm_of_piece(layout: Layout, vector: Array, start: int) -> float | None:
    """Return the norm of a slice of ``flat`` that begins at the element ``start``.

    The result is None if the slice has values that are not finite, or gaps that are not zero. Then
    the tensors must be checked one by one.
    """
    norm, bad = _measure(vector)
    return None if bad or not layout.has_zero_gaps(vector, start) else norm


def _norm_of_pieces(update: InPieces) -> float:
    """Return what ``finite_norm`` does, without joining the pieces."""
    if update.norm is not None:
        return update.norm
    norm, bad_values = 0.0, dict.fromkeys(update, 0)
    for name, values in update.by_tensor():
        part, bad = _measure(values)
        norm, bad_values[name] = math.hypot(norm, part), bad_values[name] + bad
    for name, bad in bad_values.items():
        if bad:
            raise not_finite(f"tensor '{name}'", bad)
    return min(norm, sys.float_info.max)


def not_finite(what: str, bad: int) -> NotFinite:
    """Return the error for ``what`` with so many values that are NaN or infinite."""
    values = "1 value that is" if bad == 1 else f"{bad} values that are"
    return NotFinite(f"{what} has {values} NaN or infinite")


def _count_not_finite(values: Array) -> int:
    if not is_float(values.dtype):
        return 0
    count = 0
    for start in range(0, values.size, _BLOCK):
        finite = np.isfinite(values[start : start + _BLOCK])
        if not np.logical_and.reduce(finite):
            count += int(finite.size - np.count_nonzero(finite))
    return count


def _measure(values: Array) -> tuple[float, int]:
    """Return the norm of the finite values of a vector, and how many are not finite.

    A plain sum of squares is right unless it overflows, underflows, or meets NaN; only then are
    values scaled before they are squared.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = 0.0
        for rows in _rows(values):
            squares += float(np.add.reduce(np.vecdot(rows, rows), dtype=np.float64))
        if _MIN_EXACT < squares < math.inf:
            return math.sqrt(squares), 0
        norm, bad = 0.0, 0
        for rows in filter(np.any, _rows(values)):
            finite = rows[np.isfinite(rows)].astype(np.float64)
            bad += rows.size - finite.size
            if scale := float(np.abs(finite).max(initial=0)):
                norm = math.hypot(norm, scale * math.sqrt(np.square(finite / scale).sum()))
    return norm, bad


def _rows(values: Array) -> Iterator[Array]:
    """Yield a vector's values in blocks of rows, in a dtype that BLAS can square and sum."""
    dtype = values.dtype
    if not is_float(dtype):
        dtype = np.dtype(np.float64)
    elif dtype.itemsize < np.dtype(np.float32).itemsize:
        dtype = np.dtype(np.float32)
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK].astype(dtype, copy=False)
        whole = block.size - block.size % _ROW
        if whole:
            yield block[:whole].reshape(-1, _ROW)
        if whole < block.size:
            yield block[whole:].reshape(1, -1)


def size_bytes(weights: Weights) -> int:
    """Return the size of all tensors in bytes."""
    if isinstance(weights, Tensors) and weights.memory is not None:
        return len(weights.memory)
    return sum(tensor.nbytes for tensor in weights.values())


def _check_names(weights: Forms, like: Weights) -> None:
    if weights.keys() == like.keys():
        return
    missing = sorted(map(str, like.keys() - weights.keys()))
    extra = sorted(map(str, weights.keys() - like.keys()))
    differences = [
        f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", extra))
        if names
    ]
    raise ValueError(f"tensor names differ from the model's: {'; '.join(differences)}"[:500])


def _check_tensor(
    name: str, tensor: Array | Place, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"tensor '{name}' has shape {tensor.shape}; the model has {shape}")
    if tensor.dtype != dtype and tensor.dtype.newbyteorder("=") != dtype:
        raise ValueError(f"tensor '{name}' is {tensor.dtype}; expected {dtype}")
