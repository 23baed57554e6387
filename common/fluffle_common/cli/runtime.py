"""Running until done or until told to stop: Ctrl-C and SIGTERM end a program cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Asyncio makes and drops thousands of small objects a round, few of them in cycles.
_GC_THRESHOLDS = (10_000, 20, 20)
# Of glibc's mallopt: pieces of memory up to here, which messages and models of a few megabytes take
# every round, are kept for the next instead of being given back to the system and asked for again,
# page by page, which costs about as much as filling them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _PIECE_BYTES = 32 * 2**20, 32 * 2**20


class Interrupted(Exception):
    """A signal came; what was running has been cancelled and has cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def run_until_signalled(
    main: Coroutine[Any, Any, T],
    loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> T:
    """Run a coroutine; SIGINT, SIGTERM and SIGHUP cancel it, a second one ends the process at once.

    SIGHUP, of a terminal that was closed, stays ignored under ``nohup``.

    Args:
        main: the coroutine.
        loop: makes the event loop that it runs on.

    Raises:
        Interrupted: after a signal, when the coroutine has cleaned up.
    """
    received: list[int] = []
    _leave_children_alone()

    async def watched() -> T:
        # What has been imported stays: the garbage collector need not look through it again.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        _keep_memory()
        running = asyncio.get_running_loop()
        task = asyncio.ensure_future(main)
        ending = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            ending.append(signal.SIGHUP)

        def stop(number: int) -> None:
            received.append(number)
            task.cancel()
            for each in ending:
                running.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)

        for each in ending:
            running.add_signal_handler(each, stop, each)
            _once(each)
        return await task

    with (
        contextlib.suppress(asyncio.CancelledError),
        asyncio.Runner(loop_factory=loop) as runner,
    ):
        return runner.run(watched())
    raise Interrupted(received[0] if received else signal.SIGTERM)


def _once(number: int) -> None:
    """Let the handler of a signal take it once; the kernel itself ends the process at the next.

    Whoever holds the GIL, such as a regular expression at its worst, keeps our handler from being
    called, and must not keep a second Ctrl-C from being heard. Nothing happens where the C library
    knows no such handlers.
    """
    install = getattr(ctypes.CDLL(None), "sysv_signal", None)
    if install is not None:
        install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        install(number, install(number, None))


@functools.cache
def _leave_children_alone() -> None:
    """See to it that a signal to a forked child is the child's own affair; once is enough.

    What a task forks inherits our handlers and the socket through which they wake our loop: the
    SIGTERM by which a pool ends its processes would end us. No signal comes in between, before the
    child has let go of both.
    """
    before = threading.local()

    def hold() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

    def go_on() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def let_go() -> None:
        signal.set_wakeup_fd(-1)
        for each in _ENDING:
            signal.signal(each, signal.SIG_DFL)
        go_on()

    os.register_at_fork(before=hold, after_in_parent=go_on, after_in_child=let_go)


def _keep_memory() -> None:
    """See ``_KEPT_BYTES``; nothing happens where the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _PIECE_BYTES)
