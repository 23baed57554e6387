"""Immediate process exit, for when a user's code may still be running."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn


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
