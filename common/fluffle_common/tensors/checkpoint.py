"""Checkpoints: safetensors files with a digest, written atomically.

The metadata contains a digest of the file under ``fluffle_blake3``: the BLAKE3 of the whole file
with 64 zeros in place of the digest. Reading verifies it, and so detects damage on disk.

A checkpoint may also hold the state of a strategy, as tensors whose names begin with ``strategy/``.
``read_checkpoint`` returns the model only; ``read_whole`` returns both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import mmap
import os
import struct
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from fluffle_common.durable_files import open_regular, replacing
from fluffle_common.errors import UsageError
from fluffle_common.tensors.digest import blake3_of
from fluffle_common.tensors.layout import Layout, Tensors, bytes_of, layout_for
from fluffle_common.tensors.table import TensorEntry
from fluffle_common.tensors.weights import FLOATS, INTEGERS, Array, Weights

_HEADER_SIZE = struct.Struct("<Q")
_ALIGNMENT = 8  # of the first tensor
# The names of dtypes in the format: F32 for float32, U8 for uint8, and so on.
_DTYPES = {name: name[0].upper() + name.lstrip(ascii_lowercase) for name in FLOATS + INTEGERS}
_DTYPES["bfloat16"] = "BF16"
_NUMPY = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in _DTYPES.items()}
_READABLE = {*_DTYPES.values(), "BOOL", "C64"}  # BOOL and C64 can be read, but do not travel

_DIGEST_KEY = "fluffle_blake3"
_STRATEGY_PREFIX = "strategy/"
_METADATA = "__metadata__"
_HAS_STRATEGY_STATE = "fluffle_strategy_state"  # a key in the metadata
_BEFORE_DIGEST = f'{{"__metadata__":{{"{_DIGEST_KEY}": "'.encode()
_DIGEST_AT = _HEADER_SIZE.size + len(_BEFORE_DIGEST)
_NO_DIGEST = "0" * 64
_SMALL_BYTES = 2**22  # takes about a millisecond to hash
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint."""

    weights: dict[str, Array]
    metadata: dict[str, str]  # without the keys of this module
    strategy_state: dict[str, Array]  # under the strategy's own names


def checkpoint_name(number: int) -> str:
    """Return the file name of a round's checkpoint."""
    return f"round-{number:04d}.safetensors"


def check_names(names: Iterable[str]) -> None:
    """Raise ``ValueError`` if a tensor of a model has a name that checkpoints reserve."""
    for name in names:
        if name == _METADATA:
            raise ValueError(
                f"a tensor has the name '{name}', which is reserved in checkpoints for other data; "
                "rename this tensor"
            )
        if name.startswith(_STRATEGY_PREFIX):
            raise ValueError(
                f"the name of tensor '{name[:60]}' begins with '{_STRATEGY_PREFIX}', a prefix "
                "that is reserved in checkpoints for the state of a strategy; rename this tensor"
            )


def add_strategy_prefix(state: Weights) -> dict[str, Array]:
    """Return a strategy's state under the names that its tensors have in a checkpoint."""
    return {f"{_STRATEGY_PREFIX}{name}": tensor for name, tensor in state.items()}


def save_checkpoint(
    path: Path,
    weights: Weights,
    metadata: dict[str, str],
    strategy_state: Weights | None = None,
    *,
    named_first: bool = False,
) -> None:
    """Write a checkpoint directly from the memory of the tensors.

    The format is https://github.com/huggingface/safetensors#format. The writer of the safetensors
    library is not used because it writes to a temporary file that a crash would leave behind.

    ``named_first`` is as for ``replacing``; it is ignored for checkpoints above 4 MiB.

    Raises:
        OSError: if writing fails; an earlier file at ``path`` is then unchanged.
        ValueError: if a tensor has an unsupported dtype.
    """
    if strategy_state:
        weights = {**weights, **add_strategy_prefix(strategy_state)}
        metadata = {**metadata, _HAS_STRATEGY_STATE: "yes"}
    layout = layout_for(weights)
    entries, described = _described(layout)
    metadata_json = json.dumps({_DIGEST_KEY: _NO_DIGEST, **metadata})
    header = f'{{"__metadata__":{metadata_json}{described}}}'.encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    if isinstance(weights, Tensors) and (memory := weights.memory) is not None:
        pieces = [memory[entry.offset : entry.offset + entry.nbytes] for entry in entries]
    else:
        pieces = [bytes_of(weights[entry.name]) for entry in entries]
    start = bytearray(_HEADER_SIZE.pack(len(header)) + header)
    if layout.nbytes <= _SMALL_BYTES:
        _put_digest(start, blake3_of([start, *pieces]))
        with replacing(path, named_first=named_first) as file:
            file.writelines([start, *pieces])
        return
    # Hash while writing, and fill in the digest at the end.
    with ThreadPoolExecutor(1) as hashing, replacing(path) as file:
        digest = hashing.submit(blake3_of, [bytes(start), *pieces])
        file.writelines([start, *pieces])
        file.flush()
        os.fsync(file.fileno())
        _put_digest(start, digest.result())
        file.seek(0)
        file.write(start)


def _put_digest(start: bytearray, digest: bytes) -> None:
    start[_DIGEST_AT : _DIGEST_AT + len(_NO_DIGEST)] = digest.hex().encode()


@functools.lru_cache(4)
def _described(layout: Layout) -> tuple[list[TensorEntry], str]:
    """Return the tensors in the order of their data, and their part of the header.

    The data of tensors with larger elements comes first, so that all tensors are aligned. The
    header names the tensors in their own order.
    """
    entries = sorted(
        layout.table, key=lambda entry: (-layout.places[entry.name].dtype.itemsize, entry.name)
    )
    ends = list(itertools.accumulate(entry.nbytes for entry in entries))
    end_of = {entry.name: end for entry, end in zip(entries, ends, strict=True)}
    items = []
    for name, dtype, shape, _, nbytes, *_ in layout.table:
        offsets = end_of[name] - nbytes, end_of[name]
        description = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": offsets}
        items.append(f",{json.dumps(name)}:{json.dumps(description)}")
    return entries, "".join(items)


def read_checkpoint(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a checkpoint's weights and metadata; raise what ``read_whole`` raises."""
    checkpoint = read_whole(path)
    return checkpoint.weights, checkpoint.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Read a checkpoint's metadata; raise ``UsageError`` if the file is missing or unreadable."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a checkpoint with the safetensors library, and name the file in errors."""
    from safetensors import SafetensorError, safe_open

    try:
        # safetensors calls any file that cannot be opened missing, and a pipe blocks it.
        open(path, "rb", opener=open_regular).close()
    except FileNotFoundError:
        raise UsageError(f"there is no model file {path}") from None
    except OSError as why:
        raise UsageError(f"{path} cannot be read ({why.strerror})") from None
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        wrong = f"{path} is not a complete model file in the safetensors format ({error})"
        raise UsageError(wrong) from None


def names_in(metadata: Mapping[str, str], key: str) -> tuple[str, ...]:
    """Return the names under a key of a checkpoint's metadata; empty if it has none.

    Another program may have written anything under this key, which then means nothing.

    >>> names_in({"classes": '["a", "b"]'}, "classes"), names_in({"classes": "a,b"}, "classes")
    (('a', 'b'), ())
    """
    try:
        names = json.loads(metadata.get(key, "[]"))
    except (ValueError, RecursionError):
        return ()
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def read_whole(path: Path) -> Checkpoint:
    """Read a checkpoint, including the strategy's state; tensors are in the order of the header.

    In that order, they were saved: sums over all tensors, such as a norm, depend on it, and tasks
    may, too.

    Raises:
        UsageError: if the file is missing or truncated, does not match its digest, or contains a
            dtype that NumPy does not have.
    """
    with _opened(path) as file:
        _check_readable(path, {name: file.get_slice(name).get_dtype() for name in file.keys()})
        weights = {name: file.get_tensor(name) for name in _read_header(path)[0]}
        metadata: dict[str, str] = file.metadata() or {}
        _check_digest(path)
    metadata.pop(_DIGEST_KEY, None)
    names: list[str] = []
    if metadata.pop(_HAS_STRATEGY_STATE, None):  # else the prefix has no meaning
        names = [name for name in weights if name.startswith(_STRATEGY_PREFIX)]
    strategy_state = {name.removeprefix(_STRATEGY_PREFIX): weights.pop(name) for name in names}
    return Checkpoint(weights, metadata, strategy_state)


def map_tensors(path: Path) -> dict[str, Array]:
    """Map a checkpoint's tensors into memory, read-only: what is not used takes none.

    The digest of the file is not verified.

    Raises:
        UsageError: if the file is missing or truncated, or contains a dtype that does not travel.
    """
    read_metadata(path)
    header, start = _read_header(path)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _check_readable(path, {name: told["dtype"] for name, told in header.items()}, _NUMPY)
    return {
        name: np.ndarray(
            told["shape"],
            _NUMPY[told["dtype"]],
            memory,
            start + told["data_offsets"][0],
        )
        for name, told in header.items()
    }


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the descriptions of the tensors, in order, and where the data starts."""
    with open(path, "rb") as file:
        (size,) = _HEADER_SIZE.unpack(file.read(_HEADER_SIZE.size))
        header = json.loads(file.read(size))
    header.pop(_METADATA, None)
    return header, _HEADER_SIZE.size + size


def _check_readable(
    path: Path, dtypes: Mapping[str, str], readable: Container[str] = _READABLE
) -> None:
    for name, dtype in dtypes.items():
        if dtype not in readable:
            raise UsageError(
                f"tensor '{name}' of {path} is {dtype}, which is not supported; convert this "
                "tensor to BF16"
            )


def _check_digest(path: Path) -> None:
    """Raise ``ValueError`` if a file has a digest and does not match it."""
    with open(path, "rb") as file:
        start = bytearray(file.read(_DIGEST_AT + len(_NO_DIGEST)))
        if start[_HEADER_SIZE.size : _DIGEST_AT] != _BEFORE_DIGEST:
            return  # written by an earlier version or another program
        expected = bytes(start[_DIGEST_AT:])
        start[_DIGEST_AT:] = _NO_DIGEST.encode()
        digest = blake3_of(itertools.chain([start], iter(lambda: file.read(_READ_BYTES), b"")))
    if digest.hex().encode() != expected:
        raise ValueError(
            "the model does not match the digest in the file: the file is damaged, or was "
            f"changed without removing {_DIGEST_KEY} from its metadata"
        )
