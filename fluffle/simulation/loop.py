"""An event loop whose time is the simulation's: it moves on when nobody has anything left to do.

What a simulated client is said to take, an hour of training or a minute of sending, passes in no
time; what the computer itself has to do, such as training or writing a checkpoint, takes none of
the simulation's. So the same seeds give the same events in the same order, each time.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fluffle_common.errors import RunError


class _Selector(selectors.DefaultSelector):
    """Waits for nothing: where the loop would, its time moves on instead."""

    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if timeout is None:
            raise RunError("the simulation is stuck: no event is due any more")
        self.loop.pass_time(timeout)
        return found


class SimulatedLoop(asyncio.SelectorEventLoop):
    """The loop. Its time begins at 0 s, which is the moment of the real time it was made at."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._began_at = time.time()
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.set_default_executor(InTheLoop(max_workers=1))

    def time(self) -> float:
        """Return how many seconds have been simulated."""
        return self._now_s

    def wall_time(self) -> float:
        """Return the simulated time in seconds since 1970, UTC; see ``fluffle_common.clock``."""
        return self._began_at + self._now_s

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Do nothing: there is no thread to wait for, and time does not pass for one."""

    def pass_time(self, seconds: float) -> None:
        """Let time move on."""
        self._now_s += seconds


class InTheLoop(ThreadPoolExecutor):
    """Does in the loop itself what would be handed to a thread, so that no time passes."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do it, and return what became of it."""
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except BaseException as wrong:
            done.set_exception(wrong)
        return done
