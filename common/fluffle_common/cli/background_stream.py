"""A text stream whose writers never block and never get an error.

::

    write() ──> pending (bounded) ──thread──> file, pipe or terminal

If the disk is full, the terminal is closed, or the reader is gone or does not read (``| less``,
Ctrl-S), text that cannot be written is dropped and counted. Once writing works again, a line says
how much is missing. The thread writes to the file descriptor directly, because Python's buffers
keep what a full disk refused and fail again when the process exits.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import threading
from typing import IO

from fluffle_common.cli.printing import is_terminal
from fluffle_common.plural import plural

# How far a slow reader may lag behind, about ten thousand lines.
_CAPACITY_BYTES = 2**20


class BackgroundStream(io.TextIOBase):
    """Writes to another stream in a background thread; without one, drops all text.

    The first error is reported on stderr.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream, self._stderr = stream, sys.stderr  # which progress bars may replace later
        self._descriptor: int | None = None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
                self._descriptor = stream.fileno()
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._changed = threading.Condition()
        self._pending: list[bytes] = []
        self._size = 0
        self._writing = False
        self._lost_lines, self._reported = 0, False
        self._thread: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the underlying stream."""
        return self._encoding

    def isatty(self) -> bool:
        """Return whether the underlying stream is a terminal."""
        return is_terminal(self._stream)

    def write(self, text: str) -> int:
        """Accept a text, to be written soon or dropped; return its length."""
        # As bytes, because a write may end in the middle of a character.
        data = text.encode(self._encoding, "backslashreplace")
        with self._changed:
            if self._size + len(data) > _CAPACITY_BYTES:
                self._lost_lines += data.count(b"\n")
                return len(text)
            if not self._pending and not self._writing and not self._lost_lines:
                data = self._write_ready(data)
                if not data:
                    return len(text)
            self._pending.append(data)
            self._size += len(data)
            if self._thread is None and self._stream is not None:
                self._thread = threading.Thread(target=self._run, name="output", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return len(text)

    def _write_ready(self, data: bytes) -> bytes:
        """Write as much as possible without blocking; return the rest for the thread.

        Passing every line through the thread would make a round of a small model 10 % slower. A
        terminal counts as writable even if it has room for one byte only, and then blocks.
        """
        if self._descriptor is None or os.isatty(self._descriptor):
            return data
        left = memoryview(data)
        writable = select.poll()
        writable.register(self._descriptor, select.POLLOUT)
        while left:
            ready = writable.poll(0)
            try:  # a writable pipe takes up to PIPE_BUF bytes without blocking
                count = os.write(self._descriptor, left[: select.PIPE_BUF]) if ready else 0
            except OSError:  # the thread gets the same error and reports it
                count = 0
            if not count:
                break
            left = left[count:]
        return bytes(left)

    def flush(self) -> None:
        """Do nothing, because all text is written as soon as possible."""

    def settle(self, within_s: float) -> bool:
        """Wait until no text is pending; return False after ``within_s`` seconds."""
        with self._changed:
            return self._thread is None or self._changed.wait_for(
                lambda: not self._pending and not self._writing, within_s
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._pending))
                data = b"".join(self._pending)
                self._pending, self._size, self._writing = [], 0, True
                lost = self._lost_lines
            self._write_out(data, lost)

    def _write_out(self, data: bytes, lost: int) -> None:
        if lost:
            note = f"… {plural(lost, 'line')} could not be written here\n"
            data = note.encode(self._encoding, "backslashreplace") + data
        try:
            self._put(data)
        except (OSError, ValueError) as why:
            with self._changed:
                self._lost_lines += data.count(b"\n") - bool(lost)
            if not self._reported:
                self._reported = True
                reason = getattr(why, "strerror", None) or why
                text = f"fluffle: cannot write the log ({reason}); continuing without it\n"
                with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be None
                    self._stderr.write(text)
                    self._stderr.flush()
        else:
            with self._changed:
                self._lost_lines -= lost

    def _put(self, data: bytes) -> None:
        assert self._stream is not None
        if self._descriptor is None:
            self._stream.write(data.decode(self._encoding))
            self._stream.flush()
            return
        left = memoryview(data)
        while left:
            try:
                written = os.write(self._descriptor, left)
            except BlockingIOError:  # another process has made the terminal non-blocking
                select.select([], [self._descriptor], [], 1.0)
                continue
            left = left[written:]
