"""The end of a process: by a signal, or by itself, which a user's code cannot delay for ever."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from typing import NoReturn

from fluffle_common.cli.printing import echo_sentences, one_line

_PATIENCE_S = 10.0
_OURS = ("MainThread", "exit", "output", "training")


class Interrupted(Exception):
    """A signal cancelled the coroutine that ran, which has cleaned up; ends the program."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def exit_now(code: int) -> NoReturn:
    """End the process now, skipping the interpreter's own shutdown.

    Interpreter shutdown waits for threads in C code or frees memory under them: BLAS may then hang,
    and XLA may die of SIGABRT or SIGSEGV. Open files are not flushed, except stdout and stderr.
    """
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:  # atexit would have ended the code's children
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or a broken pipe
            stream.flush()
    os._exit(code)


def exit_soon(code: int, patience_s: float = _PATIENCE_S) -> NoReturn:
    """End the process; give the interpreter's own shutdown at most ``patience_s`` seconds.

    Shutdown waits for the threads, thread pools and child processes that a user's code has left,
    and runs its ``atexit`` functions. Any of these may never end.
    """

    def watch() -> None:
        threading.Event().wait(patience_s)  # the code may have replaced time.sleep
        echo_sentences(
            f"fluffle: exiting although code outside fluffle is still running after "
            f"{patience_s:.0f} s ({one_line(_left_running())}); let your code end its "
            "threads and child processes",
            err=True,
        )
        exit_now(code)

    threading.Thread(target=watch, name="exit", daemon=True).start()
    sys.exit(code)


def _left_running() -> str:
    left = [f"thread {each.name}" for each in threading.enumerate() if each.name not in _OURS]
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        left += [f"process {child.pid}" for child in multiprocessing.active_children()]
    return ", ".join(left[:5]) or "an atexit function"


def reset_when_delivered(number: int) -> None:
    """Let the kernel reset a signal to its default action when it is first delivered.

    Python runs handlers only between bytecodes, so code that holds the GIL, such as a slow regular
    expression, delays them. With this, the second Ctrl-C kills the process even then. It does
    nothing if the C library lacks ``sysv_signal``.
    """
    install = getattr(ctypes.CDLL(None), "sysv_signal", None)
    if install is not None:
        install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        install(number, install(number, None))
