"""The end of the process while a task's code is at work in it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process now, without the interpreter's own way out.

    That one waits for, or takes memory away from, what runs in C code: BLAS then never ends, and
    XLA ends with SIGABRT or SIGSEGV. What is to be written has to be written before.
    """
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:  # a task's children would outlive us, which atexit sees to
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)
