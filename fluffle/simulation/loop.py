"""An event loop with simulated time, which advances when nothing is left to run.

Whenever the loop would wait for a timer, its clock jumps there instead. Simulated durations, such
as an hour of training, take no real time, and real work, such as writing a checkpoint, takes no
simulated time. What is due at the same time happens in the order in which it was scheduled. So the
same seeds give the same events in the same order, also in a run that is continued.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

from fluffle_common.clock import in_time_of
from fluffle_common.errors import RunError

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class _Selector(selectors.DefaultSelector):
    """Never waits; where a selector would, the loop's clock advances instead."""

    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if timeout is None:
            raise RunError(
                "the simulation is stuck, because the coordinator and all clients are waiting for "
                "each other; this is a bug in fluffle: report it, with the command"
            )
        self.loop.now_s += timeout
        return found


class _Timer(asyncio.TimerHandle):
    """A timer that fires after those that were set before it for the same time."""

    number = 0

    def __lt__(self, other: Any) -> bool:
        return (self.when(), self.number) < (other.when(), other.number)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """The loop. Its time starts at 0 s, which corresponds to the wall time of its creation."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._began_at = time.time()
        self._numbers = itertools.count()
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return the simulated time in seconds."""
        return self.now_s

    def wall_time(self) -> float:
        """Return the simulated time in seconds since 1970, UTC; see ``fluffle_common.clock``."""
        return self._began_at + self.now_s

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Do what asyncio's loop does, except that its heap has no order between equal times."""
        timer = _Timer(when, callback, args, self, context)
        timer.number = next(self._numbers)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def run_forever(self) -> None:
        """Run until stopped, with the simulated clocks."""
        with in_time_of(self):
            super().run_forever()

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """Run the work at once in this thread, so that no simulated time passes."""
        done: Future[_T] = Future()
        try:
            done.set_result(func(*args))
        except BaseException as wrong:
            done.set_exception(wrong)
        return asyncio.wrap_future(done, loop=self)
