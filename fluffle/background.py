"""Runs work with its own event loop in a thread, for callers with or without a running loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, TypeVar

import uvloop

from fluffle_common.errors import FluffleError

P = ParamSpec("P")
T = TypeVar("T")


class Cancelled(Exception):
    """The work was cancelled before it returned a result."""


def short_traceback(function: Callable[P, T]) -> Callable[P, T]:
    """Leave fluffle's own frames out of the tracebacks of its errors and of Ctrl-C.

    In a notebook, they would fill a hundred lines above the message.
    """

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return function(*arguments, **keywords)
        except (FluffleError, KeyboardInterrupt) as why:
            why.__traceback__ = None
            raise why

    return call


class Background(Generic[T]):
    """Work in a thread of its own.

    The thread is necessary because a notebook's thread already runs an event loop, and because
    work that takes minutes must not block a caller's loop.

    Args:
        body: the work; its argument is a function that runs a coroutine and returns its result.
        loop: makes the event loop for those coroutines.
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
        """Return the result; Ctrl-C cancels the work and is raised once that has cleaned up."""
        try:
            return self._result.result()
        except KeyboardInterrupt:
            self._cancel()
            self._result.exception()
            raise

    async def result(self) -> T:
        """Return the result; cancelling this coroutine cancels the work and waits for its end."""
        done = asyncio.wrap_future(self._result)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            self._cancel()
            await asyncio.wait([done])
            done.exception()  # retrieved, so that asyncio does not log it
            raise

    def _run(self) -> None:
        try:
            result = self._body(self._run_coroutine)
        except asyncio.CancelledError:
            self._result.set_exception(Cancelled())
        except BaseException as why:
            self._result.set_exception(why)
        else:
            self._result.set_result(result)

    def _run_coroutine(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end, and wait for the threads of its loop's executor."""

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
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                self._loop.call_soon_threadsafe(self._task.cancel)
