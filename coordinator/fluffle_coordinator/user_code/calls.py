"""Calls of users' functions: errors become one line, slow calls are reported, hanging ones left.

A strategy, a schedule or a selection that fails ends the run. That loses nothing, because no update
is acknowledged before its round is on disk.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from types import FunctionType
from typing import Any, NoReturn, TypeVar

from fluffle_common.cli.exit_now import exit_now
from fluffle_common.cli.user_code import warn_in_full
from fluffle_common.errors import RunError, TaskError, UsageError
from fluffle_common.protocol.events import Slow
from fluffle_common.user_errors import is_ctrl_c, one_line

T = TypeVar("T")

_SLOW_S = 30
_THREAD = "user-call"


def failed(what: str, where: str, why: str) -> TaskError:
    """Return the error that ends a run because a user's code failed; see ``call_guarded``."""
    return TaskError(
        f"the {what} failed in {where}: {why}; fix the error and run the same command "
        "again (no update is lost)"
    )


def call_guarded(
    what: str, where: str, function: Callable[..., T], *on: Any, ours: bool = False
) -> T:
    """Call a user's function; ``what`` and ``where`` it is are for the message of an error.

    A disk that refuses an update, which a strategy keeps there, is not the code's error.

    Raises:
        TaskError: if it fails; the traceback goes to stderr, unless the code is ``ours``.
    """
    try:
        return function(*on)
    except BaseException as why:
        if isinstance(why, RunError) or is_ctrl_c(why):
            raise
        if not ours:
            warn_in_full(why, what.partition(" ")[0])
        raise failed(what, where, one_line(why)) from why


def check_object(
    base: type, name: str, value: Any, methods: Iterable[str], **fields: type
) -> dict[str, Any]:
    """Check that ``value``, which ``name`` loads, is like an instance of ``base``; return fields.

    Raises:
        UsageError: if it is a class or function, or lacks some of the methods or fields.
        TaskError: if its code fails.
    """
    kind, made = base.__name__.lower(), type(value).__name__
    if isinstance(value, type | FunctionType):
        raise UsageError(
            f"--{kind} {name} is a class or a function, not a {kind}; create an object, such "
            f"as my_{value.__name__.lower()} = {value.__name__}(), and give this object instead"
        )
    found = {
        field: call_guarded(f"{kind} {name}", field, getattr, value, field, None)
        for field in (*methods, *fields)
    }
    missing = [f"{method}()" for method in methods if not callable(found[method])]
    missing += [f"{f} ({t.__name__})" for f, t in fields.items() if not isinstance(found[f], t)]
    if missing:
        raise UsageError(
            f"--{kind} {name} is not a {kind}: this {made} lacks {', '.join(missing)}; inherit "
            f"from {base.__module__}.{base.__name__}"
        )
    return found


def misfit(function: Callable[..., object], *arguments: object) -> str:
    """Return why a function does not accept so many arguments; empty if it may do so."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as wrong:
        return str(wrong)
    except ValueError:  # a function in C may have no signature
        pass
    return ""


async def call_user(what: str, call: Callable[[], T], record: Callable[[Slow], object]) -> T:
    """Return the result of a function, which is called in a daemon thread.

    Cancelling this coroutine abandons the call. The thread is a daemon because the process waits
    for all other threads before it exits. A call that has run for 30 s, 60 s, 120 s and so on is
    recorded.
    """
    result = asyncio.get_running_loop().run_in_executor(_THREADS, call)
    running_s = pause_s = _SLOW_S
    try:
        while not (await asyncio.wait([result], timeout=pause_s))[0]:
            record(Slow(what=what, running_s=running_s))
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
