"""An update in parts, kept until all of it is checked: a little in memory, the rest in a file.

The sum of a round is only touched by what is known to be sound as a whole: in floating point, what
was added cannot be taken back exactly. So the parts wait, and of a large update most of them on
disk, where they take no memory that anything else needs.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fluffle_common.protocol.messages import Transfer
from fluffle_common.protocol.transfer import Incoming
from fluffle_common.tensors.layout import Layout
from fluffle_common.tensors.pieces import InPieces
from fluffle_common.tensors.weights import norm_of_piece

_IN_MEMORY_BYTES = 8 * 2**20
_PIECE_BYTES = 2**20  # of the file, read at a time: it stays in the processor's cache


class SpoolFile:
    """A file without a name, which serves one spool after the other.

    It is made when it is needed, and goes when nobody reads it any more, as a thread may.

    Args:
        folder: where it is; None: among the system's temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def write(self, start: int, payload: memoryview) -> None:
        """Write to a place.

        Raises:
            OSError: where the disk refuses.
        """
        if self._descriptor is None:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
        while payload:
            done = os.pwrite(self._descriptor, payload, start)
            start, payload = start + done, payload[done:]

    def read(self, start: int, into: memoryview) -> None:
        """Read what was written to a place.

        Raises:
            OSError: where the disk refuses.
        """
        assert self._descriptor is not None
        while into:
            done = os.preadv(self._descriptor, [into], start)
            if not done:
                raise OSError("the file of the spool was cut off")
            start, into = start + done, into[done:]


class Spool(Incoming):
    """The parts of one update; iterating yields its bytes in order, in pieces, once complete.

    Args:
        transfer: what was announced.
        max_bytes: the most that may be announced.
        layout: how the tensors lie in it; all of one dtype.
        file: for what is not kept in memory; no other spool uses it meanwhile.
    """

    def __init__(self, transfer: Transfer, max_bytes: int, layout: Layout, file: SpoolFile) -> None:
        super().__init__(transfer, max_bytes)
        self._layout, self._file = layout, file
        self._in_memory: dict[int, memoryview] = {}
        self._in_file: dict[int, int] = {}
        self._room_bytes = _IN_MEMORY_BYTES
        self._norms: dict[int, float | None] = {}

    def _store(self, start: int, payload: memoryview) -> None:
        assert self._layout.dtype is not None
        vector = np.frombuffer(payload, self._layout.dtype)
        self._norms[start] = norm_of_piece(self._layout, vector, start // vector.itemsize)
        if len(payload) > self._room_bytes:
            with contextlib.suppress(OSError):  # a disk that is full costs memory, not the update
                self._file.write(start, payload)
                self._in_file[start] = len(payload)
                return
        self._in_memory[start] = payload.toreadonly()
        self._room_bytes -= len(payload)

    def payload(self) -> InPieces:
        """Return the tensors, once all parts are there.

        Raises:
            MalformedMessage: of cause ``tensors``, where they are not what was announced.
        """
        self.check_digest()
        norms = [self._norms[start] for start in sorted(self._norms)]
        whole = math.hypot(*[norm for norm in norms if norm is not None])
        known = None if None in norms else min(whole, sys.float_info.max)
        return InPieces(self._layout, self, known)

    def __iter__(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_PIECE_BYTES if self._in_file else 0))
        for start in sorted([*self._in_memory, *self._in_file]):
            if start in self._in_memory:
                yield self._in_memory[start]
                continue
            end = start + self._in_file[start]
            for begin in range(start, end, _PIECE_BYTES):
                piece = buffer[: end - begin]
                self._file.read(begin, piece)
                yield piece.toreadonly()
