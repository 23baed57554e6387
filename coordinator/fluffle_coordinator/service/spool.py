"""Stores the parts of a large update until all are checked: 8 MiB in memory, the rest in a file.

An update must be complete and valid before any of it is added to the sum, because floating-point
addition cannot be undone exactly. So its parts have to wait, and a large update waits on disk.
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
from fluffle_common.protocol.transfer_parts import Incoming
from fluffle_common.tensors.in_pieces import InPieces
from fluffle_common.tensors.layout import Layout
from fluffle_common.tensors.weights import norm_of_piece

_IN_MEMORY_BYTES = 8 * 2**20
_PIECE_BYTES = 2**20  # read from the file at a time; fits into the processor's cache


class SpoolFile:
    """An unnamed temporary file, reused by one spool after another.

    It is created at the first write, in ``folder`` or in the system's temporary folder, and closed
    with its last reference, which a thread may hold.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def write(self, start: int, payload: memoryview) -> None:
        """Write at an offset; ``OSError`` if the disk refuses."""
        if self._descriptor is None:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
        while payload:
            count = os.pwrite(self._descriptor, payload, start)
            start, payload = start + count, payload[count:]

    def read(self, start: int, into: memoryview) -> None:
        """Fill a buffer from an offset; ``OSError`` if the disk refuses."""
        assert self._descriptor is not None
        while into:
            count = os.preadv(self._descriptor, [into], start)
            if not count:
                raise OSError(f"the temporary file of an update is truncated at byte {start}")
            start, into = start + count, into[count:]


class Spool(Incoming):
    """The parts of one update; once complete, iterating yields its bytes in order, in pieces.

    A piece is only valid until the next one, because pieces from the file share a buffer. The
    tensors of ``layout`` are all of one dtype, and no other spool may use ``file`` meanwhile.
    """

    def __init__(self, transfer: Transfer, layout: Layout, file: SpoolFile) -> None:
        super().__init__(transfer)
        self._layout, self._file = layout, file
        # By offset: the bytes, or how many bytes are in the file; and the norm.
        self._parts: dict[int, tuple[memoryview | int, float | None]] = {}
        self._room_bytes = _IN_MEMORY_BYTES

    def _store(self, start: int, payload: memoryview) -> None:
        assert self._layout.dtype is not None
        vector = np.frombuffer(payload, self._layout.dtype)
        norm = norm_of_piece(self._layout, vector, start // vector.itemsize)
        if len(payload) > self._room_bytes:
            with contextlib.suppress(OSError):  # if the disk is full, use memory instead
                self._file.write(start, payload)
                self._parts[start] = len(payload), norm
                return
        self._parts[start] = payload.toreadonly(), norm
        self._room_bytes -= len(payload)

    def payload(self) -> InPieces:
        """Return the tensors of a complete transfer, with their norm if every piece has one.

        Raises:
            MalformedMessage: with cause ``tensors``, if the digest differs from the announced one.
        """
        self.check_digest()
        norms = [self._parts[start][1] for start in sorted(self._parts)]
        known = [norm for norm in norms if norm is not None]
        whole = min(math.hypot(*known), sys.float_info.max) if len(known) == len(norms) else None
        return InPieces(self._layout, self, whole)

    def __iter__(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for start in sorted(self._parts):
            part, _ = self._parts[start]
            if isinstance(part, memoryview):
                yield part
                continue
            end = start + part
            for begin in range(start, end, _PIECE_BYTES):
                piece = buffer[: end - begin]
                self._file.read(begin, piece)
                yield piece.toreadonly()
