"""The archive of a run's updates (``--keep-updates``), from which a round can be replayed.

::

    runs/letters/updates/round-0007/
        0001-north.msgpack    the message that was counted first, byte for byte
        0002-south.msgpack
        0002-south.payload    its tensors, if they travelled in parts

The number is the update's place in the running sum, from 1: the last bits of an average depend on
the order. Files are written under a temporary name and then renamed, so each is complete. All files
of a round are on disk before its history line is.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterable
from pathlib import Path

from fluffle_common.durable_files import make_folder, replacing
from fluffle_common.transport.base import Body

_UPDATES = "updates"


def round_folder(run: Path, number: int) -> Path:
    """Return the folder of a round's updates."""
    return run / _UPDATES / f"round-{number:04d}"


def update_path(run: Path, number: int, place: int, worker: str) -> Path:
    """Return the file of an update's message.

    >>> str(update_path(Path("runs/letters"), 7, 1, "north"))
    'runs/letters/updates/round-0007/0001-north.msgpack'
    """
    return round_folder(run, number) / f"{place:04d}-{worker}.msgpack"


def keep_update(path: Path, body: Body, payload: Iterable[memoryview] | None) -> None:
    """Write an update's message, and its payload if that travelled in parts."""
    for folder in (path.parent.parent, path.parent):
        make_folder(folder, parents=False)  # a run folder that was removed is not created anew
    if payload is not None:  # written first: a message's payload must exist when the message does
        with replacing(path.with_suffix(".payload")) as file:
            file.writelines(payload)
    with replacing(path) as file:
        file.write(body)


def read_update(path: Path) -> tuple[bytes, memoryview | None]:
    """Return the body of an update, and its payload (mapped from disk) if it travelled in parts.

    Raises:
        OSError: if the message does not exist or cannot be read.
    """
    body = path.read_bytes()
    payload = path.with_suffix(".payload")
    if not payload.exists():
        return body, None
    with payload.open("rb") as file:
        if not payload.stat().st_size:  # an empty file cannot be mapped
            return body, memoryview(b"")
        return body, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def forget_uncommitted(run: Path, committed: int) -> None:
    """Remove the updates of rounds that are not committed; the broker redelivers them."""
    for folder in (run / _UPDATES).glob("round-*"):
        number = folder.name.removeprefix("round-")
        if number.isdigit() and int(number) > committed:
            shutil.rmtree(folder)
