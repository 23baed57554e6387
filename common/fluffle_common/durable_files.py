"""Durable files: atomic replacement, and folders whose entries survive a power failure."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_BUFFER_BYTES = 2**18  # a small model is written in one system call


@contextlib.contextmanager
def replacing(path: Path, *, named_first: bool = False) -> Iterator[IO[bytes]]:
    """Yield a file to write to; on success it is fsynced and atomically replaces ``path``.

    A symbolic link stays, and the file that it names is replaced. A pipe or a device cannot be
    replaced; it is written to in place.

    Args:
        path: the file to create or replace.
        named_first: if ``path`` is new, rename the file before its fsync, so that one fsync writes
            content and name, which takes a third less time. After a power failure, the name may
            then stand for a truncated file, so use it only for files that contain their own digest.

    Raises:
        OSError: if writing fails; a file at ``path`` is then unchanged.
    """
    final = str(path)  # a string: Path objects cost 2 % of a small round
    exists = os.path.exists(final)
    if exists and not os.path.isfile(final):
        with open(final, "wb") as special:
            yield special
        return
    if os.path.islink(final):
        final = os.path.realpath(final)
    partial = f"{final}.partial"
    named_first = named_first and not exists
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
    sync_folder(os.path.dirname(final))  # makes the new name durable


def open_regular(path: str, flags: int) -> int:
    """Open a regular file; an ``opener`` for ``open``.

    Raises:
        OSError: if it cannot be opened, or is something else, such as a pipe, which blocks.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return os.open(path, flags, 0o666)


def sync_folder(folder: str | Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, *, parents: bool = True) -> None:
    """Create a folder durably, with missing parents unless ``parents`` is false.

    Raises:
        OSError: if it cannot be created. A folder called ``~`` is not: a shell leaves ``--run=~/x``
            as it is, and so do files.
    """
    if folder.is_dir():
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if any(path.name == "~" for path in missing):
        raise OSError(errno.ENOENT, "~ does not stand for the home folder here", str(folder))
    folder.mkdir(parents=parents, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)
