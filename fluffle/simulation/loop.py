"""An event loop with simulated time, which advances when nothing is left to run.

Whenever the loop would wait for a timer, its clock jumps there instead. Simulated durations, such
as an hour of training, take no real time, and real work, such as writing a checkpoint, takes no
simulated time. So the same seeds give the same events in the same order.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar, TypeVarTuple

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
            raise RunError("the simulation is stuck: no further event is due")
        self.loop.pass_time(timeout)
        return found


class SimulatedLoop(asyncio.SelectorEventLoop):
    """The loop. Its time starts at 0 s, which corresponds to the wall time of its creation."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._began_at = time.time()
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.set_default_executor(InTheLoop(max_workers=1))

    def time(self) -> float:
        """Return the simulated time in seconds."""
        return self._now_s

    def wall_time(self) -> float:
        """Return the simulated time in seconds since 1970, UTC; see ``fluffle_common.clock``."""
        return self._began_at + self._now_s

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """Run the work at once in this thread, whatever executor it is meant for."""
        return super().run_in_executor(None, func, *args)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Do nothing: there are no threads to wait for."""

    def pass_time(self, seconds: float) -> None:
        """Advance the clock."""
        self._now_s += seconds


class InTheLoop(ThreadPoolExecutor):
    """Runs work in the event loop's thread instead of another, so that no simulated time passes."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run the work at once; return a future that is done."""
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except BaseException as wrong:
            done.set_exception(wrong)
        return done
