"""How named tensors lie in one piece of memory: on the wire, and in the processes at both ends.

They follow each other, little-endian, each at a multiple of 64 bytes. A layout is worked out and
checked once, and then serves every model and every update of the same form; what lies in one piece,
and is all of one dtype, is sent, checked and added up as one vector, however many tensors it has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fluffle_common.tensors.table import (
    CACHED_TABLES,
    MAX_CACHED_TENSORS,
    MAX_DIMENSIONS,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
    MODEL,
    TensorEntry,
)

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, Array]

FLOATS = ("bfloat16", "float16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = frozenset(FLOATS + INTEGERS)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # for NumPy it is of kind "V", not of "f"

ALIGNMENT = 64
Signature = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]

# How each dtype that travels is called; in this byte order an array needs no conversion.
_TRAVELS = {np.dtype(name).newbyteorder("<"): name for name in DTYPES}
_READ = {name: dtype for dtype, name in _TRAVELS.items()}
_REMEDIES = {
    "bool": "keep it out of the weights or use uint8",
    "complex": "split it into its real and imaginary parts",
    "float8": "use bfloat16",
    "float": "use float64",  # longer ones, whatever this machine calls them
    "longdouble": "use float64",
    "int": "use int8",  # of 2 or 4 bits
    "uint": "use uint8",
}
_KEEP_OUT = "keep it out of the weights"


class Place(NamedTuple):
    """Where one tensor lies: ``offset`` in bytes, ``size`` in elements."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    size: int


class Tensors(Mapping[str, Array]):
    """Named tensors in one piece of memory; arrays are made of it when they are asked for.

    Args:
        layout: in which places they are.
        memory: the piece, where it is as it travels.
        flat: all of them in one vector, together with what is between them, which means nothing;
            None where they have several dtypes.
    """

    __slots__ = ("_made", "flat", "layout", "memory")

    def __init__(self, layout: Layout, memory: memoryview | None, flat: Array | None) -> None:
        self.layout, self.memory, self.flat = layout, memory, flat
        self._made: dict[str, Array] | None = None

    @property
    def as_dict(self) -> dict[str, Array]:
        """The tensors one by one, for many to be asked for; not to be changed."""
        if self._made is None:
            self._made = self._make(self.layout.places)
        return self._made

    def _make(self, places: Mapping[str, Place]) -> dict[str, Array]:
        memory, flat = self.memory, self.flat
        if memory is not None:
            return {
                name: np.ndarray(shape, dtype, memory, offset)
                for name, (dtype, shape, offset, _) in places.items()
            }
        assert flat is not None
        return {
            name: flat[offset // dtype.itemsize :][:size].reshape(shape)
            for name, (dtype, shape, offset, size) in places.items()
        }

    def __getitem__(self, name: str) -> Array:
        return self.as_dict[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)


class Layout:
    """Where the tensors of a table lie; made by ``layout_of`` and ``layout_for``.

    Args:
        table: the entries, as they are on the wire.

    Raises:
        ValueError: where an entry is not what it says, or does not lie behind the entry before it.
    """

    def __init__(self, table: tuple[TensorEntry, ...]) -> None:
        self.table = table
        self.places = _checked(table)
        last = table[-1] if table else None
        self.nbytes = last.offset + last.nbytes if last else 0
        dtypes = {place.dtype for place in self.places.values()}
        self.signature: Signature = tuple(
            [(name, p.dtype, p.shape) for name, p in self.places.items()]
        )
        self.floats = all(map(is_float, dtypes))
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None  # of all tensors; None: of several
        ends = [entry.offset + entry.nbytes for entry in table]
        starts = [entry.offset for entry in table[1:]]
        self._gaps = [(a, b) for a, b in zip(ends, starts, strict=False) if a < b]
        self._small_gaps = all(end - start < ALIGNMENT for start, end in self._gaps)
        self._between: Array | None = None  # the same in elements, once it was asked for

    def over(self, memory: bytes | memoryview) -> Tensors:
        """Return the tensors as views of ``memory``; read-only where that is.

        Raises:
            ValueError: where it has not ``nbytes`` bytes.
        """
        if len(memory) != self.nbytes:
            raise ValueError(misfit(self.table, self.nbytes, len(memory)))
        flat = None if self.dtype is None else np.frombuffer(memory, self.dtype)
        return Tensors(self, memoryview(memory), flat)

    def empty(self) -> Tensors:
        """Return tensors with any values; what is between them is 0, since it travels with them."""
        memory = np.empty(self.nbytes, np.uint8).data
        self.clear_gaps(memory)
        return self.over(memory)

    def clear_gaps(self, memory: memoryview) -> None:
        """Write 0 between the tensors."""
        for start, end in self._gaps:
            memory[start:end] = bytes(end - start)

    def zero_between(self, flat: Array, start: int = 0) -> bool:
        """Whether ``flat``, of this layout, is known to hold 0 wherever no tensor is.

        Gaps are as small as alignment asks for; into larger ones nobody looks. ``flat`` may be a
        piece of the vector, from the element ``start`` on.
        """
        if not self._small_gaps:
            return False
        if self._between is None:
            size = flat.dtype.itemsize
            gaps = [np.arange(start // size, end // size) for start, end in self._gaps]
            self._between = np.concatenate(gaps) if gaps else np.empty(0, np.intp)
        between = self._between
        if flat.nbytes < self.nbytes:
            first, end = np.searchsorted(between, (start, start + flat.size))
            between = between[first:end] - start
        return not flat[between].any()

    def empty_as(self, dtype: np.dtype[Any]) -> Tensors:
        """Return tensors of the same names and shapes in another dtype, with any values.

        Where all of this layout have one dtype, they are of this layout too: each element has the
        place in ``flat`` that it has here.
        """
        if self.dtype is None:
            places = self.places.items()
            return layout_of_signature(
                tuple([(n, dtype, place.shape) for n, place in places])
            ).empty()
        return Tensors(self, None, np.empty(self.nbytes // self.dtype.itemsize, dtype))


def layout_of(table: tuple[TensorEntry, ...]) -> Layout:
    """Return the layout that a table describes.

    Raises:
        ValueError: where an entry is not what it says, or does not lie behind the entry before it.
    """
    return _layout_of(table) if len(table) <= MAX_CACHED_TENSORS else Layout(table)


def layout_for(weights: Weights) -> Layout:
    """Return the layout in which these weights travel.

    Raises:
        ValueError: for a dtype that does not travel.
    """
    if isinstance(weights, Tensors):
        return weights.layout
    return layout_of_signature(signature_of(weights))


def check_signature(weights: Weights) -> None:
    """Check that these can be the weights of a model: that every tensor travels.

    Raises:
        ValueError: naming the first tensor that does not, and the remedy.
    """
    if not weights:
        raise ValueError("there is no tensor in the weights")
    for name, tensor in weights.items():
        if not hasattr(tensor, "dtype") or not hasattr(tensor, "shape"):
            made_by = "np.asarray makes one of numbers"
            raise ValueError(
                f"{_told(name)} is of type {type(tensor).__name__}, not an array; {made_by}"
            )
    layout_for(weights)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype that travels is a float."""
    return dtype.kind == "f" or dtype == BFLOAT16


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite value of a float dtype.

    >>> largest(np.dtype("float16"))
    65504.0
    """
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def signature_of(weights: Weights) -> Signature:
    """Return the names, dtypes and shapes of tensors, in their order."""
    return tuple([(name, tensor.dtype, tensor.shape) for name, tensor in weights.items()])


def layout_of_signature(form: Signature) -> Layout:
    """Return the layout in which tensors of these names, dtypes and shapes travel.

    Raises:
        ValueError: for a dtype that does not travel.
    """
    return _layout_of_signature(form) if len(form) <= MAX_CACHED_TENSORS else Layout(_table(form))


def misfit(table: tuple[TensorEntry, ...], nbytes: int, there: int) -> str:
    """Say why a payload of ``there`` bytes does not go with a table that ends at ``nbytes``."""
    for entry in table:
        end = entry.offset + entry.nbytes
        if end > there:
            return f"tensor '{entry.name}' ends at byte {end}, the payload has {there}"
    return f"{there - nbytes} bytes of the payload belong to no tensor"


def bytes_of(tensor: Array) -> memoryview:
    """Return a tensor as it travels; one that is little-endian and C-contiguous is not copied."""
    if not tensor.size:
        return memoryview(b"")
    ready = np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C")
    return ready.reshape(-1).view(np.uint8).data  # bfloat16 has no buffer of its own


def as_maps(table: tuple[TensorEntry, ...]) -> list[dict[str, Any]]:
    """Return a table as it is on the wire."""
    return _as_maps(table) if len(table) <= MAX_CACHED_TENSORS else [*map(_as_map, table)]


@functools.lru_cache(CACHED_TABLES)
def _as_maps(table: tuple[TensorEntry, ...]) -> list[dict[str, Any]]:
    return [*map(_as_map, table)]


def _as_map(entry: TensorEntry) -> dict[str, Any]:
    told = entry._asdict()
    if entry.group == MODEL:
        del told["group"]
    return told


@functools.lru_cache(CACHED_TABLES)
def _layout_of(table: tuple[TensorEntry, ...]) -> Layout:
    return Layout(table)


@functools.lru_cache(CACHED_TABLES)
def _layout_of_signature(form: Signature) -> Layout:
    return layout_of(_table(form))


def _table(form: Signature) -> tuple[TensorEntry, ...]:
    if len(form) > MAX_TENSORS:
        raise ValueError(f"there are {len(form)} tensors; at most {MAX_TENSORS} can be sent")
    table, offset = [], 0
    for name, dtype, shape in form:
        _check_name(name)
        called = _TRAVELS.get(dtype) or _TRAVELS.get(dtype.newbyteorder("<"))
        if called is None:
            raise ValueError(
                f"{_told(name)} is {str(dtype)[:60]}, which does not travel; {_remedy(dtype.name)}"
            )
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(
                f"{_told(name)} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} can be "
                "sent; reshape it"
            )
        offset += -offset % ALIGNMENT
        nbytes = math.prod(shape) * dtype.itemsize
        table.append(TensorEntry(name, called, shape, offset, nbytes))
        offset += nbytes
    return tuple(table)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ValueError(f"{_told(name)} is named by a {type(name).__name__}; name it by a string")
    if not name:
        raise ValueError("a tensor has the empty name ''; give it one")
    if len(name) > MAX_TENSOR_NAME:
        raise ValueError(
            f"{_told(name)} has a name of {len(name)} characters; at most {MAX_TENSOR_NAME} "
            "can be sent; shorten it"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_told(ascii(name))} has a name that is not valid Unicode") from None


def _remedy(dtype: str) -> str:
    return next((r for start, r in _REMEDIES.items() if dtype.startswith(start)), _KEEP_OUT)


def _told(name: object) -> str:
    """Name a tensor in an error, however long its name is."""
    told = str(name)
    return f"tensor '{told[:60]}…'" if len(told) > MAX_TENSOR_NAME else f"tensor '{told}'"


def _checked(table: tuple[TensorEntry, ...]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    end = 0
    for name, called, shape, offset, nbytes, _ in table:
        dtype = _READ.get(called)
        if dtype is None:
            raise ValueError(f"tensor '{name}' has the unknown dtype '{called}'")
        if name in places:
            raise ValueError(f"tensor '{name}' is there twice")
        size = math.prod(shape)
        if size * dtype.itemsize != nbytes:
            raise ValueError(
                f"tensor '{name}' of shape {shape} and {called} cannot have {nbytes} bytes"
            )
        if offset < end or offset % ALIGNMENT:
            raise ValueError(
                f"tensor '{name}' has the wrong offset {offset}: "
                f"a multiple of {ALIGNMENT} is expected, from {end} on"
            )
        if not nbytes:
            try:
                np.empty(shape, dtype)
            except (ValueError, OverflowError):  # no bytes, and yet a dimension beyond all bounds
                told = f"tensor '{name}' has the impossible shape {shape}"
                raise ValueError(told[:500]) from None
        places[name] = Place(dtype, shape, offset, size)
        end = offset + nbytes
    return places
