"""An event loop with virtual time, which advances only while every task and thread waits.

While a thread works, time stands still, and a thread that sleeps does so in virtual time. A
federation that trains for hours takes milliseconds, and events always happen in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import selectors
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from fluffle.simulation.loop import SimulatedLoop

_STUCK_S = 60.0  # of real time


class Stuck(Exception):
    """No task can ever continue, or a thread does not return."""


class _Ended(BaseException):
    """Ends a worker's thread after its federation has ended."""


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0:
            return []  # callbacks are due, and what a thread calls is among them
        if self.loop.busy:
            ready = super().select(_STUCK_S)
            if not ready:
                raise Stuck(f"a thread has been at work for {_STUCK_S:.0f} s")
            return ready
        if timeout is None:
            raise Stuck("everybody waits, and nothing is due")
        self.loop.now_s += timeout
        return []


class _Steps(deque[Any]):
    """The callbacks that are due; calls ``act`` before a callback with a given number."""

    def __init__(self, due: Iterable[Any], number: int, act: Callable[[], object]) -> None:
        super().__init__(due)
        self._left, self._act = number, act

    def popleft(self) -> Any:
        self._left -= 1
        if self._left == 0:
            self._act()
        return super().popleft()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time.

    ``busy`` is the number of working threads and ``now_s`` the time. Only the loop changes them.
    """

    def __init__(self) -> None:
        self.now_s, self.busy, self.over = 1000.0, 0, False
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    run_in_executor = SimulatedLoop.run_in_executor  # type: ignore[assignment]

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now_s

    def at_step(self, number: int, act: Callable[[], object]) -> None:
        """Call ``act`` before the ``number``-th callback from now."""
        self._ready = _Steps(self._ready, number, act)

    def sleep(self, seconds: float) -> None:
        """Sleep in a worker's thread, in virtual time; the federation's end wakes and ends it."""
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
    """The thread that runs one worker's task, one callable at a time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Append a callable."""
        self._loop.busy += 1
        self._todo.put(work)

    async def at_rest(self) -> None:
        """Wait until the work is done: unlike a process, a thread cannot be killed amid it."""
        done = self._loop.create_future()

        def tell() -> None:
            self._loop.call_soon_threadsafe(done.set_result, None)

        self.put(tell)
        await done

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
