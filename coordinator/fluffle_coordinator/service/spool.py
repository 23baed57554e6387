"""An update in parts, kept until all of it is checked: a little in memory, the rest in a file.

The sum of a round is only touched by what is known to be sound as a whole: in floating point, what
was added cannot be taken back exactly. So the parts wait, and of a large update most of them on
disk, where they take no memory that anything else needs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fluffle_common.protocol.messages import Transfer
from fluffle_common.protocol.transfer import Incoming

_IN_MEMORY_BYTES = 16 * 2**20
_PIECE_BYTES = 2**20  # of the file, read at a time: it stays in the processor's cache


class SpoolFile:
    """A file without a name, which serves one spool after the other; made when it is needed.

    Args:
        folder: where it is; None: among the system's temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def write(self, start: int, payload: memoryview) -> None:
        """Write to a place.

        Raises:
            OSError: where the disk refuses.
        """
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
        while payload:
            done = os.pwrite(self._file.fileno(), payload, start)
            start, payload = start + done, payload[done:]

    def read(self, start: int, into: memoryview) -> None:
        """Read what was written to a place.

        Raises:
            OSError: where the disk refuses.
        """
        assert self._file is not None
        while into:
            done = os.preadv(self._file.fileno(), [into], start)
            if not done:
                raise OSError("the file of the spool was cut off")
            start, into = start + done, into[done:]


class Spool(Incoming):
    """The parts of one transfer; iterating yields its bytes in order, in pieces, once complete.

    A piece is good until the next one is asked for.

    Args:
        transfer: what was announced.
        max_bytes: the most that may be announced.
        file: for what is not kept in memory; no other spool uses it meanwhile.
    """

    def __init__(self, transfer: Transfer, max_bytes: int, file: SpoolFile) -> None:
        super().__init__(transfer, max_bytes)
        self._file = file
        self._in_memory: dict[int, memoryview] = {}
        self._in_file: dict[int, int] = {}
        self._kept_bytes = 0

    def _keep(self, start: int, payload: memoryview) -> None:
        if self._kept_bytes + len(payload) > _IN_MEMORY_BYTES:
            with contextlib.suppress(OSError):  # a disk that is full costs memory, not the update
                self._file.write(start, payload)
                self._in_file[start] = len(payload)
                return
        self._in_memory[start] = payload
        self._kept_bytes += len(payload)

    def __len__(self) -> int:
        return self.transfer.nbytes

    def __iter__(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_PIECE_BYTES if self._in_file else 0))
        for start in sorted([*self._in_memory, *self._in_file]):
            if start in self._in_memory:
                yield self._in_memory[start].toreadonly()
                continue
            end = start + self._in_file[start]
            for begin in range(start, end, _PIECE_BYTES):
                piece = buffer[: end - begin]
                self._file.read(begin, piece)
                yield piece.toreadonly()
