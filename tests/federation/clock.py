"""A loop whose time is the tests': it moves on when nobody has anything left to do.

Threads count: while one works, time stands still, and a thread that sleeps does so in this time.
So a federation that trains for hours is over in milliseconds, and always in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import selectors
import threading
from collections.abc import Callable
from typing import Any

from fluffle.simulation.loop import InTheLoop

_STUCK_S = 5.0  # of real time


class Stuck(Exception):
    """Nobody will ever have anything to do again, or a thread does not come back."""


class _Ended(BaseException):
    """Ends a thread of a federation that is over."""


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if self.loop.busy:
            found = super().select(_STUCK_S)
            if not found:
                raise Stuck(f"a thread has been at work for {_STUCK_S:.0f} s")
        elif timeout is None:
            raise Stuck("everybody waits, and nothing is due")
        else:
            self.loop.now_s += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop; ``busy`` threads are at work, ``now_s`` is its time. Only the loop changes them."""

    def __init__(self) -> None:
        self.now_s, self.busy, self.over = 1000.0, 0, False
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.set_default_executor(InTheLoop(max_workers=1))

    def time(self) -> float:
        """Return the time of the tests."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Sleep in a thread, for so many seconds of this time; a federation that ends wakes it."""
        woken = threading.Event()

        def wake() -> None:
            self.busy += 1
            woken.set()

        def rest() -> None:
            self.busy -= 1
            self.call_later(seconds, wake)

        self.call_soon_threadsafe(rest)
        while not woken.wait(0.05):
            if self.over:
                raise _Ended


class Training:
    """The thread in which one worker's task runs, one callable after the other."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Ask for one more."""
        self._loop.busy += 1
        self._todo.put(work)

    def end(self) -> None:
        """End the thread, once the loop is over."""
        self._todo.put(None)
        self._thread.join(_STUCK_S)
        assert not self._thread.is_alive(), "a thread of a test is left behind"

    def _run(self) -> None:
        while (work := self._todo.get()) is not None:
            try:
                work()
            except _Ended:
                return
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._rest)

    def _rest(self) -> None:
        self._loop.busy -= 1
