"""The thread that runs a task's code, one job at a time, off the event loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol


class Training(Protocol):
    """Runs callables one at a time, in order, off the event loop."""

    def put(self, work: Callable[[], object]) -> object:
        """Queue a callable and return at once."""


class TrainingThread:
    """A thread that runs queued callables, so that heartbeats continue during a long step.

    It is a daemon thread: a step that never returns must not keep the process alive. The callables
    must handle their own errors.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Queue a callable and return at once; the first call starts the thread."""
        self._queue.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="training", daemon=True)
            self._thread.start()

    def end(self, patience_s: float) -> None:
        """Stop the thread once its queue is empty; wait for that at most ``patience_s`` seconds."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(patience_s)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
