"""Checkpoints: weights in a safetensors file, which any framework opens, whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import IO

from fluffle_common.errors import UsageError
from fluffle_common.layout import Layout, Tensors, bytes_of, layout_for
from fluffle_common.messages import TensorEntry
from fluffle_common.weights import FLOATS, INTEGERS, Array, Weights

_HEADER_SIZE = struct.Struct("<Q")
_ALIGNMENT = 8  # of the first tensor
# How the format calls each dtype: float32 is F32, uint8 is U8; and one by another rule.
_DTYPES = {name: name[0].upper() + name.lstrip(ascii_lowercase) for name in FLOATS + INTEGERS}
_DTYPES["bfloat16"] = "BF16"
# A small model is written in one go.
_BUFFER_BYTES = 2**18


def checkpoint_name(number: int) -> str:
    """Return the file name of a round's checkpoint."""
    return f"round-{number:04d}.safetensors"


def save_checkpoint(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """Write a checkpoint, straight from the memory of the tensors.

    The format is https://github.com/huggingface/safetensors#format; its own writer goes by way of a
    file with a name of chance, which a crash would leave behind.

    Raises:
        OSError: where the disk refuses; an earlier file of that name is as it was.
        ValueError: for a dtype that does not travel.
    """
    layout = layout_for(weights)
    in_order, described = _described(layout)
    header = f'{{"__metadata__":{json.dumps(metadata)}{described}}}'.encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    if isinstance(weights, Tensors) and (memory := weights.memory) is not None:
        pieces = [memory[entry.offset : entry.offset + entry.nbytes] for entry in in_order]
    else:
        pieces = [bytes_of(weights[entry.name]) for entry in in_order]
    with replacing(path) as file:
        file.writelines([_HEADER_SIZE.pack(len(header)), header, *pieces])


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
        UsageError: where the file is missing or is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise UsageError(f"there is no model file {path}") from None
    except (SafetensorError, OSError, ValueError) as why:
        raise UsageError(f"{path} is not a whole model file ({why})") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to; on success it becomes ``path``, fsynced, in one step.

    Raises:
        OSError: where the disk refuses; ``path`` is as it was.
    """
    final, partial = str(path), f"{path}.partial"  # a Path of each costs a small round 2 %
    try:
        with open(partial, "wb", _BUFFER_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    folder = os.open(os.path.dirname(final) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)
