"""A stream that whoever writes to it never waits for, and that never fails.

::

    write() ──> pending (bounded) ──a thread──> the file, pipe or terminal

A full disk, a reader that is gone or reads nothing (``| less``, Ctrl-S), a closed terminal: what
cannot be written is dropped and counted, and when writing works again a line says how much is
missing. The thread writes to the file descriptor itself, since Python's own buffers keep what a
full disk refused, and fail again when the process ends.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import IO

from fluffle_common.cli.printing import is_terminal

# As much as a slow reader may lag behind, some ten thousand lines.
_CAPACITY_CHARS = 2**20


class PatientStream(io.TextIOBase):
    """Writes to another stream in a thread of its own.

    Args:
        stream: where the text goes; None drops it.
        failed: called once, in that thread, with the reason why writing fails.
        capacity: how many characters may wait to be written.
    """

    def __init__(
        self,
        stream: IO[str] | None,
        failed: Callable[[str], None] = lambda _: None,
        *,
        capacity: int = _CAPACITY_CHARS,
    ) -> None:
        self._stream, self._failed, self._capacity = stream, failed, capacity
        self._descriptor: int | None = None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
                self._descriptor = stream.fileno()
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._changed = threading.Condition()
        self._pending: list[str] = []
        self._chars = 0
        self._writing = False
        self._lost_lines, self._said = 0, False
        self._torn = False  # the last thing written was cut off in the middle of a line
        self._thread: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream behind."""
        return self._encoding

    def isatty(self) -> bool:
        """Whether a terminal is behind."""
        return is_terminal(self._stream)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Take a text; it is written soon, or dropped."""
        written = len(text)
        with self._changed:
            if self._chars + len(text) > self._capacity:
                self._lost_lines += text.count("\n")
                return len(text)
            if not self._pending and not self._writing and not self._lost_lines:
                text = self._at_once(text)
                if not text:
                    return written
            self._pending.append(text)
            self._chars += len(text)
            if self._thread is None and self._stream is not None:
                self._thread = threading.Thread(target=self._run, name="output", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return written

    def _at_once(self, text: str) -> str:
        """Write what is sure not to wait, here and now; return the rest, which is the thread's.

        The thread for every line would cost a round of a small model a tenth.
        """
        if self._descriptor is None:
            return text
        left = memoryview(text.encode(self._encoding, "backslashreplace"))
        writable = select.poll()
        writable.register(self._descriptor, select.POLLOUT)
        while left:
            ready = writable.poll(0)
            try:  # a pipe that is ready takes as much without waiting
                count = os.write(self._descriptor, left[: select.PIPE_BUF]) if ready else 0
            except OSError:  # the thread finds the same, and says so
                count = 0
            if not count:
                break
            left = left[count:]
        return bytes(left).decode(self._encoding, "replace")

    def flush(self) -> None:
        """Do nothing: what was taken is written as soon as possible."""

    def settle(self, within_s: float) -> bool:
        """Wait until everything that was taken is written or dropped; return whether it is."""
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
                text = "".join(self._pending)
                self._pending, self._chars, self._writing = [], 0, True
                lost = self._lost_lines
            self._write_out(text, lost)

    def _write_out(self, text: str, lost: int) -> None:
        if lost:
            lines = f"{lost} line{'' if lost == 1 else 's'}"
            text = f"… {lines} could not be written here\n{text}"
        try:
            self._put("\n" + text if self._torn else text)
        except (OSError, ValueError) as why:
            with self._changed:
                self._lost_lines += text.count("\n") - bool(lost)
            if not self._said:
                self._said = True
                self._failed(str(getattr(why, "strerror", None) or why))
        else:
            self._torn = False
            with self._changed:
                self._lost_lines -= lost

    def _put(self, text: str) -> None:
        assert self._stream is not None
        if self._descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        left = memoryview(text.encode(self._encoding, "backslashreplace"))
        while left:
            try:
                written = os.write(self._descriptor, left)
            except BlockingIOError:  # another process has made the terminal non-blocking
                select.select([], [self._descriptor], [], 1.0)
                continue
            self._torn = True
            left = left[written:]


def warn_once(what: str) -> Callable[[str], None]:
    """Return what says on stderr, if that works, that ``what`` cannot be written.

    It is the stderr of now: while bars are drawn, they take the place of it.
    """
    stderr = sys.stderr

    def warned(reason: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            if stderr is not None:
                stderr.write(f"fluffle: cannot write {what} ({reason}); going on without it\n")
                stderr.flush()

    return warned
