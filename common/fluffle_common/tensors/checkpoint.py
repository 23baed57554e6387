"""Checkpoints: weights in a safetensors file, which any framework opens, whole or not at all.

A checkpoint carries a digest of itself in its metadata, under ``DIGEST``: the BLAKE3 of the whole
file as it is with 64 zeros in the place of the digest. What bits a disk has flipped is found when
it is read.

Beside the model, a checkpoint may hold what a strategy keeps of its state, as tensors whose names
begin with ``strategy/``. Readers of a checkpoint get the model alone; ``read_whole`` reads both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import IO

from fluffle_common.errors import UsageError
from fluffle_common.tensors.digest import blake3_of
from fluffle_common.tensors.layout import Layout, Tensors, bytes_of, layout_for
from fluffle_common.tensors.table import TensorEntry
from fluffle_common.tensors.weights import FLOATS, INTEGERS, Array, Weights

_HEADER_SIZE = struct.Struct("<Q")
_ALIGNMENT = 8  # of the first tensor
# How the format calls each dtype: float32 is F32, uint8 is U8; and one by another rule.
_DTYPES = {name: name[0].upper() + name.lstrip(ascii_lowercase) for name in FLOATS + INTEGERS}
_DTYPES["bfloat16"] = "BF16"
_READABLE = {*_DTYPES.values(), "BOOL", "C64"}  # of which the last two do not travel
# A small model is written in one go.
_BUFFER_BYTES = 2**18

DIGEST = "fluffle_blake3"
_KEPT = "strategy/"
_HAS_KEPT = "fluffle_strategy_state"  # in the metadata: the file has tensors of such names
_BEFORE_DIGEST = f'{{"__metadata__":{{"{DIGEST}": "'.encode()
_DIGEST_AT = _HEADER_SIZE.size + len(_BEFORE_DIGEST)
_NO_DIGEST = "0" * 64
_AT_ONCE_BYTES = 2**22  # the digest of so much takes a millisecond
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """What is in a checkpoint.

    Args:
        weights: the model.
        metadata: what is said of it.
        kept: what the strategy kept of its state, by its own names.
    """

    weights: dict[str, Array]
    metadata: dict[str, str]
    kept: dict[str, Array]


def checkpoint_name(number: int) -> str:
    """Return the file name of a round's checkpoint."""
    return f"round-{number:04d}.safetensors"


def check_names(weights: Weights) -> None:
    """Check that a model has no tensor that a checkpoint would take for the strategy's.

    Raises:
        ValueError: naming the first, and the remedy.
    """
    for name in weights:
        if name.startswith(_KEPT):
            raise ValueError(
                f"the name of tensor '{name[:60]}' begins with '{_KEPT}', which checkpoints "
                "reserve for the state of a strategy; rename it"
            )


def as_kept(kept: Weights) -> dict[str, Array]:
    """Return what a strategy keeps of its state, by the names that it has in a checkpoint."""
    return {f"{_KEPT}{name}": tensor for name, tensor in kept.items()}


def save_checkpoint(
    path: Path,
    weights: Weights,
    metadata: dict[str, str],
    kept: Weights | None = None,
    *,
    named_first: bool = False,
) -> None:
    """Write a checkpoint, straight from the memory of the tensors.

    The format is https://github.com/huggingface/safetensors#format; its own writer goes by way of a
    file with a name of chance, which a crash would leave behind.

    Args:
        path: the file.
        weights: the model.
        metadata: what is said of it.
        kept: what the strategy keeps of its state.
        named_first: see ``replacing``; has no effect on a large one.

    Raises:
        OSError: where the disk refuses; an earlier file of that name is as it was.
        ValueError: for a dtype that does not travel.
    """
    if kept:
        check_names(weights)
        weights = {**weights, **as_kept(kept)}
        metadata = {**metadata, _HAS_KEPT: "yes"}
    layout = layout_for(weights)
    in_order, described = _described(layout)
    told = json.dumps({DIGEST: _NO_DIGEST, **metadata})
    header = f'{{"__metadata__":{told}{described}}}'.encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    if isinstance(weights, Tensors) and (memory := weights.memory) is not None:
        pieces = [memory[entry.offset : entry.offset + entry.nbytes] for entry in in_order]
    else:
        pieces = [bytes_of(weights[entry.name]) for entry in in_order]
    start = bytearray(_HEADER_SIZE.pack(len(header)) + header)
    if layout.nbytes <= _AT_ONCE_BYTES:
        _put_digest(start, blake3_of([start, *pieces]))
        with replacing(path, named_first=named_first) as file:
            file.writelines([start, *pieces])
        return
    # The disk takes its time, and the digest too: both at once.
    with ThreadPoolExecutor(1) as beside, replacing(path) as file:
        digest = beside.submit(blake3_of, [bytes(start), *pieces])
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
    """Return the tensors in the order of the file, and what its header says of them.

    Those of larger elements come first, so that all are aligned.
    """
    in_order = sorted(
        layout.table, key=lambda entry: (-layout.places[entry.name].dtype.itemsize, entry.name)
    )
    told, end = [], 0
    for entry in in_order:
        start, end = end, end + entry.nbytes
        about = {
            "dtype": _DTYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (start, end),
        }
        told.append(f",{json.dumps(entry.name)}:{json.dumps(about)}")
    return in_order, "".join(told)


def read_checkpoint(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a checkpoint's weights and metadata.

    Raises:
        UsageError: see ``read_whole``.
    """
    found = read_whole(path)
    return found.weights, found.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Read what is said of a checkpoint's weights, without the weights.

    Raises:
        UsageError: where there is no such file, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as why:
        raise UsageError(f"{path} is not a complete model file ({why})") from None


def read_whole(path: Path) -> Checkpoint:
    """Read a checkpoint, with what the strategy kept in it.

    Raises:
        UsageError: where the file is missing, is not a whole safetensors file, is not what its
            digest says, or holds what NumPy cannot.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            _check_readable(path, {name: file.get_slice(name).get_dtype() for name in file.keys()})
            weights = {name: file.get_tensor(name) for name in file.keys()}
            metadata: dict[str, str] = file.metadata() or {}
        _check_digest(path)
    except FileNotFoundError:
        raise UsageError(f"there is no model file {path}") from None
    except (SafetensorError, OSError, ValueError) as why:
        raise UsageError(f"{path} is not a complete model file ({why})") from None
    metadata.pop(DIGEST, None)
    kept = [name for name in weights if name.startswith(_KEPT)]
    if metadata.pop(_HAS_KEPT, None) is None:
        kept = []  # of another program, which may call its tensors as it likes
    of_the_strategy = {name.removeprefix(_KEPT): weights.pop(name) for name in kept}
    return Checkpoint(weights, metadata, of_the_strategy)


def _check_readable(path: Path, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in _READABLE:
            raise UsageError(
                f"tensor '{name}' of {path} is {dtype}, which does not travel; convert it to BF16"
            )


def _check_digest(path: Path) -> None:
    """Raise ``ValueError`` where a file is not what its digest says; it need not have one."""
    with open(path, "rb") as file:
        start = bytearray(file.read(_DIGEST_AT + len(_NO_DIGEST)))
        if start[_HEADER_SIZE.size : _DIGEST_AT] != _BEFORE_DIGEST:
            return  # of an earlier version, or of another program
        there = bytes(start[_DIGEST_AT:])
        start[_DIGEST_AT:] = _NO_DIGEST.encode()
        found = blake3_of(itertools.chain([start], iter(lambda: file.read(_READ_BYTES), b"")))
    if there != found.hex().encode():
        raise ValueError(
            "its bytes do not match their digest: it is damaged, or was changed without "
            f"removing {DIGEST} from its metadata"
        )


@contextlib.contextmanager
def replacing(path: Path, *, named_first: bool = False) -> Iterator[IO[bytes]]:
    """Yield a file to write to; on success it becomes ``path``, fsynced, in one step.

    Args:
        path: the file that is there afterwards.
        named_first: sync the bytes and their name together if the name is new, in about two thirds
            of the time. Only for a file that carries a digest of itself: if the power fails
            meanwhile, the name may stand for a part of the file.

    Raises:
        OSError: where the disk refuses; ``path`` is as it was.
    """
    final, partial = str(path), f"{path}.partial"  # a Path of each costs a small round 2 %
    named_first = named_first and not os.path.exists(final)
    try:
        with open(partial, "wb", _BUFFER_BYTES) as file:
            yield file
            file.flush()
            if named_first:
                os.replace(partial, final)
            os.fsync(file.fileno())
        if not named_first:
            os.replace(partial, final)
    except BaseException:
        for name in (partial, final) if named_first else (partial,):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        raise
    sync_folder(os.path.dirname(final))  # the new name itself


def sync_folder(folder: str | Path) -> None:
    """Return when the names in a folder are on disk."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and what it is in, all of them on disk; it may be there already.

    Raises:
        OSError: where it cannot be made.
    """
    if folder.is_dir():
        return
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync_folder(one.parent)
