"""The layout of named tensors in one contiguous buffer, on the wire and in memory.

Tensors follow each other, little-endian, each at a multiple of 64 bytes. Layouts are computed and
checked once and cached, since all models and updates of a run have the same few. If all tensors
have one dtype, the whole buffer can be sent, checked and summed as a single vector (``flat``).
"""

from __future__ import annotations

import math
from collections.abc import ItemsView, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fluffle_common.tensors.table import (
    MAX_DIMENSIONS,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
    MODEL,
    TensorEntry,
    cached,
)

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, Array]

FLOATS = ("bfloat16", "float16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = frozenset(FLOATS + INTEGERS)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # for NumPy it is of kind "V", not of "f"

ALIGNMENT = 64
Signature = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]

_NAMES_BY_DTYPE = {np.dtype(name).newbyteorder("<"): name for name in DTYPES}
_DTYPES_BY_NAME = {name: dtype for dtype, name in _NAMES_BY_DTYPE.items()}
# For unsupported dtypes, by the first match of the beginning of their name.
_REMEDIES = {
    "bool": "keep this tensor out of the weights or use uint8",
    "complex": "split this tensor into its real and imaginary parts",
    "float8": "use bfloat16",
    "float": "use float64",  # float96 or float128
    "longdouble": "use float64",
    "int": "use int8",  # int2 or int4
    "uint": "use uint8",
    "": "keep this tensor out of the weights",
}


class Place(NamedTuple):
    """The place of one tensor in the buffer: ``offset`` in bytes, ``size`` in elements."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    size: int


Forms = Mapping[str, Array | Place]
"""Anything with the dtype and the shape of each tensor, by name."""


class Tensors(Mapping[str, Array]):
    """Named tensors in one buffer; the arrays are created on first access.

    Args:
        layout: the tensors' places in the buffer.
        memory: the buffer in its wire format; None if ``flat`` has another dtype than the layout.
        flat: the buffer as one vector, including the gaps between tensors, whose values are
            undefined; None if the tensors have several dtypes.
    """

    __slots__ = ("_arrays", "flat", "layout", "memory")

    def __init__(self, layout: Layout, memory: memoryview | None, flat: Array | None) -> None:
        self.layout, self.memory, self.flat = layout, memory, flat
        self._arrays: dict[str, Array] | None = None

    @property
    def as_dict(self) -> dict[str, Array]:
        """All tensors by name; callers must not modify this dict."""
        if self._arrays is not None:
            return self._arrays
        memory, flat, places = self.memory, self.flat, self.layout.places
        if memory is not None:
            self._arrays = {
                name: np.ndarray(shape, dtype, memory, offset)
                for name, (dtype, shape, offset, _) in places.items()
            }
        else:
            assert flat is not None
            self._arrays = {
                name: flat[offset // dtype.itemsize :][:size].reshape(shape)
                for name, (dtype, shape, offset, size) in places.items()
            }
        return self._arrays

    def __getitem__(self, name: str) -> Array:
        return self.as_dict[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)

    def items(self) -> ItemsView[str, Array]:
        """Return all tensors with their names; ``Mapping`` would look each one up."""
        return self.as_dict.items()


class Layout:
    """The layout of a tensor table; created by ``layout_of`` and ``layout_for``.

    Raises:
        ValueError: if an entry is inconsistent, or overlaps or precedes the entry before it.
    """

    def __init__(self, table: tuple[TensorEntry, ...]) -> None:
        self.table = table
        self.places = _checked_places(table)  # of the tensors, by name
        last = table[-1] if table else None
        self.nbytes = last.offset + last.nbytes if last else 0
        dtypes = {place.dtype for place in self.places.values()}
        self.signature: Signature = tuple(
            [(name, p.dtype, p.shape) for name, p in self.places.items()]
        )
        self.floats = all(map(is_float, dtypes))  # whether all tensors are floats
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None  # of all tensors
        ends = [entry.offset + entry.nbytes for entry in table]
        starts = [entry.offset for entry in table[1:]]
        self._gaps = [(a, b) for a, b in zip(ends, starts, strict=False) if a < b]
        self._gaps_are_small = all(end - start < ALIGNMENT for start, end in self._gaps)
        self._gap_elements: Array | None = None  # computed on first use

    def over(self, memory: bytes | memoryview) -> Tensors:
        """Return the tensors as views of ``memory``, read-only if it is read-only.

        Raises:
            ValueError: if ``memory`` does not have ``nbytes`` bytes.
        """
        if len(memory) != self.nbytes:
            raise ValueError(size_mismatch(self.table, self.nbytes, len(memory)))
        flat = None if self.dtype is None else np.frombuffer(memory, self.dtype)
        return Tensors(self, memoryview(memory), flat)

    def empty(self) -> Tensors:
        """Return tensors with undefined values; the gaps, which travel too, are zero."""
        memory = np.empty(self.nbytes, np.uint8).data
        self.clear_gaps(memory)
        return self.over(memory)

    def clear_gaps(self, memory: memoryview) -> None:
        """Fill the gaps between the tensors with zeros."""
        for start, end in self._gaps:
            memory[start:end] = bytes(end - start)

    def has_zero_gaps(self, flat: Array, start: int = 0) -> bool:
        """Whether the gaps in ``flat`` hold zeros; False if a gap is larger than alignment needs.

        ``flat`` may be a slice, which begins at the element ``start``.
        """
        if not self._gaps_are_small:
            return False
        assert self.dtype is not None
        size = self.dtype.itemsize  # not that of ``flat``, which ``empty_as`` may have changed
        if self._gap_elements is None:
            gaps = [np.arange(start // size, end // size) for start, end in self._gaps]
            self._gap_elements = np.concatenate(gaps) if gaps else np.empty(0, np.intp)
        elements = self._gap_elements
        if flat.size < self.nbytes // size:
            first, end = np.searchsorted(elements, (start, start + flat.size))
            elements = elements[first:end] - start
        return not flat[elements].any()

    def empty_as(self, dtype: np.dtype[Any]) -> Tensors:
        """Return tensors with the same names and shapes, of another dtype and undefined values.

        If this layout has a single dtype, ``flat`` of the result has the elements in the same
        places as ``flat`` of this layout's tensors.
        """
        if self.dtype is not None:
            return Tensors(self, None, np.empty(self.nbytes // self.dtype.itemsize, dtype))
        signature = tuple([(name, dtype, place.shape) for name, place in self.places.items()])
        return layout_of_signature(signature).empty()


@cached
def layout_of(table: tuple[TensorEntry, ...]) -> Layout:
    """Return the layout that a table describes; raises what ``Layout`` does."""
    return Layout(table)


def layout_for(weights: Weights) -> Layout:
    """Return the layout in which weights travel; raise ``ValueError`` for an unsupported dtype."""
    if isinstance(weights, Tensors):
        return weights.layout
    return layout_of_signature(signature_of(weights))


def check_signature(weights: Weights) -> None:
    """Raise ``ValueError`` unless weights can be a model: arrays that travel, at least one."""
    if not weights:
        raise ValueError("the weights contain no tensors; expected at least one tensor")
    for name, tensor in weights.items():
        # A tensor of PyTorch has dtypes of its own.
        if not isinstance(getattr(tensor, "dtype", None), np.dtype) or not hasattr(tensor, "shape"):
            raise ValueError(
                f"{_label(name)} is of type {type(tensor).__name__}, not an array; convert it "
                "with np.asarray"
            )
        if isinstance(tensor, np.ma.MaskedArray):  # what travels has no mask
            raise ValueError(
                f"{_label(name)} is a masked array; fill it, for example with filled(0)"
            )
    layout_for(weights)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a supported dtype is a float."""
    return dtype.kind == "f" or dtype == BFLOAT16


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite value of a float dtype.

    >>> largest(np.dtype("float16"))
    65504.0
    """
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def signature_of(weights: Weights) -> Signature:
    """Return the names, dtypes and shapes of tensors, in order."""
    return tuple([(name, tensor.dtype, tensor.shape) for name, tensor in weights.items()])


@cached
def layout_of_signature(signature: Signature) -> Layout:
    """Return the layout of these names, dtypes and shapes; raise what ``layout_for`` does."""
    return layout_of(_table_of(signature))


def size_mismatch(table: tuple[TensorEntry, ...], nbytes: int, actual: int) -> str:
    """Return why a payload of ``actual`` bytes does not match a table that ends at ``nbytes``."""
    for entry in table:
        end = entry.offset + entry.nbytes
        if end > actual:
            return f"tensor '{entry.name}' ends at byte {end}, but the payload has {actual} bytes"
    return f"{actual - nbytes} bytes of the payload belong to no tensor"


def bytes_of(tensor: Array) -> memoryview:
    """Return a tensor's bytes as they travel, without a copy if it is already in that format."""
    if not tensor.size:
        return memoryview(b"")
    ready = np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C")
    return ready.reshape(-1).view(np.uint8).data  # bfloat16 does not support the buffer protocol


@cached
def as_maps(table: tuple[TensorEntry, ...]) -> list[dict[str, Any]]:
    """Return a table in its wire format; callers must not modify it."""
    maps = [entry._asdict() for entry in table]
    for fields in maps:
        if fields["group"] == MODEL:
            del fields["group"]
    return maps


def _table_of(signature: Signature) -> tuple[TensorEntry, ...]:
    if len(signature) > MAX_TENSORS:
        raise ValueError(
            f"the number of tensors is {len(signature)}; at most {MAX_TENSORS} can be sent"
        )
    table, offset = [], 0
    for name, dtype, shape in signature:
        _check_name(name)
        dtype_name = _NAMES_BY_DTYPE.get(dtype) or _NAMES_BY_DTYPE.get(dtype.newbyteorder("<"))
        if dtype_name is None:
            remedy = next(r for start, r in _REMEDIES.items() if dtype.name.startswith(start))
            raise ValueError(
                f"{_label(name)} is {str(dtype)[:60]}, which is not supported; {remedy}"
            )
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(
                f"{_label(name)} has {len(shape)} dimensions; reshape it to at most "
                f"{MAX_DIMENSIONS} dimensions"
            )
        offset += -offset % ALIGNMENT
        nbytes = math.prod(shape) * dtype.itemsize
        table.append(TensorEntry(name, dtype_name, shape, offset, nbytes))
        offset += nbytes
    return tuple(table)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ValueError(f"{_label(name)} has a name of type {type(name).__name__}; use a string")
    if not name:
        raise ValueError("a tensor has the empty name ''; give the tensor a name")
    if len(name) > MAX_TENSOR_NAME:
        raise ValueError(
            f"{_label(name)} has a name of {len(name)} characters; use a name of at most "
            f"{MAX_TENSOR_NAME} characters"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{_label(ascii(name)[1:-1])} has a name that is not valid Unicode; rename this tensor"
        ) from None


def _label(name: object) -> str:
    """Return how error messages refer to a tensor, shortening very long names."""
    text = str(name)
    return f"tensor '{text[:60]}…'" if len(text) > MAX_TENSOR_NAME else f"tensor '{text}'"


def _checked_places(table: tuple[TensorEntry, ...]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    end = 0
    for name, dtype_name, shape, offset, nbytes, _ in table:
        dtype = _DTYPES_BY_NAME.get(dtype_name)
        if dtype is None:
            raise ValueError(f"tensor '{name}' has the unknown dtype '{dtype_name}'")
        if name in places:
            raise ValueError(f"tensor '{name}' appears twice")
        size = math.prod(shape)
        if size * dtype.itemsize != nbytes:
            raise ValueError(
                f"tensor '{name}' of shape {shape} and dtype {dtype_name} cannot have {nbytes} "
                "bytes"
            )
        if offset < end or offset % ALIGNMENT:
            raise ValueError(
                f"tensor '{name}' has the wrong offset {offset}; expected a multiple of "
                f"{ALIGNMENT} that is at least {end}"
            )
        if not nbytes:
            try:
                np.empty(shape, dtype)
            except (ValueError, OverflowError):  # one dimension is 0, another one too large
                message = f"tensor '{name}' has the impossible shape {shape}"
                raise ValueError(message[:500]) from None
        places[name] = Place(dtype, shape, offset, size)
        end = offset + nbytes
    return places
