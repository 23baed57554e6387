"""The updates of a run, kept as they came (``--keep-updates``), so that a round can be replayed.

::

    runs/letters/updates/round-0007/
        0001-north.msgpack    the message that was counted first, byte for byte
        0002-south.msgpack
        0002-south.payload    its tensors, where they travelled in parts beside the message

The number is the place in the running sum, from 1: the last bit of an average depends on it. A file
is written beside its name and then renamed, so that a name always stands for a whole file, and all
files of a round are on disk before its history line is.
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
    """Return where the updates of a round are kept."""
    return run / _UPDATES / f"round-{number:04d}"


def update_path(run: Path, number: int, place: int, worker: str) -> Path:
    """Return where the message of one update is kept.

    >>> str(update_path(Path("runs/letters"), 7, 1, "north"))
    'runs/letters/updates/round-0007/0001-north.msgpack'
    """
    return round_folder(run, number) / f"{place:04d}-{worker}.msgpack"


def keep_update(path: Path, body: Body, payload: Iterable[memoryview] | None) -> None:
    """Write one update; nothing with the final name is there before all of it is.

    Args:
        path: what ``update_path`` says.
        body: the message as it came.
        payload: its tensors, in pieces, where they came in parts; None where they are in the body.

    Raises:
        OSError: where the disk refuses; call again for another try.
    """
    make_folder(path.parent)
    if payload is not None:  # first: a message is only there when all that it needs is
        with replacing(path.with_suffix(".payload")) as file:
            file.writelines(payload)
    with replacing(path) as file:
        file.write(body)


def read_update(path: Path) -> tuple[bytes, memoryview | None]:
    """Return the body and, where it came in parts, the payload (a view of the file) of an update.

    Raises:
        OSError: where the message is not there or cannot be read.
    """
    body = path.read_bytes()
    beside = path.with_suffix(".payload")
    if not beside.exists():
        return body, None
    with beside.open("rb") as file:
        if not beside.stat().st_size:
            return body, memoryview(b"")
        return body, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def forget_uncommitted(run: Path, committed: int) -> None:
    """Remove the updates of the rounds that are not committed: their updates will come again.

    Raises:
        OSError: where the disk refuses.
    """
    for folder in (run / _UPDATES).glob("round-*"):
        number = folder.name.removeprefix("round-")
        if number.isdigit() and int(number) > committed:
            shutil.rmtree(folder)
