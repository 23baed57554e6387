"""A thread with an event loop of its own, for callers with a loop and without one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import uvloop

T = TypeVar("T")


class Cancelled(Exception):
    """The work was cancelled before it had a result."""


class Background(Generic[T]):
    """Work in a thread of its own, beside whoever wants its result.

    A notebook has an event loop that is running already, so that no other can run in its thread;
    and what is at work for minutes is not to hold up a caller's loop.

    Args:
        body: the work; it is given a function that runs a coroutine to its end.
        loop: makes the event loop.
    """

    def __init__(
        self,
        body: Callable[[Callable[[Coroutine[Any, Any, Any]], Any]], T],
        loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
    ) -> None:
        self._body, self._make_loop = body, loop
        self._result: Future[T] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any]
        self._stopping = False
        threading.Thread(target=self._run, name="fluffle", daemon=True).start()

    def wait(self) -> T:
        """Return the result; Ctrl-C cancels the work, and is raised when that has cleaned up."""
        try:
            return self._result.result()
        except KeyboardInterrupt:
            self._cancel()
            self._result.exception()
            raise

    async def result(self) -> T:
        """Return the result; who is cancelled meanwhile cancels the work, and waits for its end."""
        done = asyncio.wrap_future(self._result)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            self._cancel()
            await asyncio.wait([done])
            done.exception()  # so that nobody misses it
            raise

    def _run(self) -> None:
        try:
            found = self._body(self._complete)
        except asyncio.CancelledError:
            self._result.set_exception(Cancelled())
        except BaseException as why:
            self._result.set_exception(why)
        else:
            self._result.set_result(found)

    def _complete(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine; when this returns, what it has asked of other threads is done, too."""

        async def main() -> Any:
            self._task = asyncio.ensure_future(work)
            self._loop = asyncio.get_running_loop()
            if self._stopping:
                self._task.cancel()
            return await self._task

        with asyncio.Runner(loop_factory=self._make_loop) as runner:
            return runner.run(main())

    def _cancel(self) -> None:
        self._stopping = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has just come to its end
                self._loop.call_soon_threadsafe(self._task.cancel)
