"""The training thread: a user's code runs in it, one piece after the other, off the event loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol


class Training(Protocol):
    """Runs callables one after the other, off the event loop."""

    def put(self, work: Callable[[], object]) -> object:
        """Run this when all that was put before is done; returns at once."""


class TrainingThread:
    """A thread of its own, so that signs of life keep going out while a step takes its time.

    It is a daemon: a step that never ends must not keep the process from ending. What runs in it
    catches its own errors.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Run this when all that was put before is done; the first call starts the thread."""
        self._queue.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="training", daemon=True)
            self._thread.start()

    def end(self, patience_s: float) -> None:
        """Let the thread end when all that was put before is done; wait so long for that."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(patience_s)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
