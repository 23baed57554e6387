"""Calls of users' functions off the event loop: a slow one is noted, a hanging one abandoned.

They run in daemon threads, because the process waits for all other threads before it exits.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, NoReturn, TypeVar

from fluffle_common.cli.exit_now import exit_now

T = TypeVar("T")

_SLOW_S = 30.0
_THREAD = "user-call"


async def call_user(what: str, call: Callable[[], T], note: Callable[[str], object]) -> T:
    """Return the result of a function, which is called in a daemon thread.

    Cancelling this coroutine abandons the call.

    Args:
        what: what is called, for messages.
        call: the function.
        note: called with a message when the function has run for 30 s, 60 s, 120 s and so on.
    """
    result = asyncio.get_running_loop().run_in_executor(_THREADS, call)
    running_s = pause_s = _SLOW_S
    try:
        while not (await asyncio.wait([result], timeout=pause_s))[0]:
            note(f"{what} has been running for {running_s:.0f} s; the run waits for it")
            running_s, pause_s = 2 * running_s, running_s
        return result.result()
    finally:
        result.cancel()


def leave(code: int) -> NoReturn:
    """End the process: at once if an abandoned call is still running."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        exit_now(code)
    sys.exit(code)


class _DaemonThreads(Executor):
    """Runs each call in a daemon thread of its own."""

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Start the call; it cannot be cancelled."""
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = work(*args, **kwargs)
            except BaseException as why:
                done.set_exception(why)
            else:
                done.set_result(result)

        threading.Thread(target=run, name=_THREAD, daemon=True).start()
        return done


_THREADS = _DaemonThreads()
