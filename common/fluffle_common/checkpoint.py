"""Checkpoints: weights in a safetensors file, which any framework opens, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fluffle_common.errors import UsageError
from fluffle_common.weights import Array, Weights


def checkpoint_name(number: int) -> str:
    """Return the file name of a round's checkpoint."""
    return f"round-{number:04d}.safetensors"


def save_checkpoint(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """Write a checkpoint.

    Raises:
        OSError: where the disk refuses; an earlier file of that name is as it was.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # It writes memory as it lies there, whatever the strides say of it.
    plain = {
        name: np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C")
        for name, tensor in weights.items()
    }
    with replacing(path) as partial:
        try:
            save_file(plain, partial, metadata=metadata)
        except SafetensorError as why:  # it wraps what the disk said
            raise OSError(str(why)) from None


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
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to; on success it becomes ``path``, fsynced, in one step.

    Raises:
        OSError: where the disk refuses; ``path`` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)
