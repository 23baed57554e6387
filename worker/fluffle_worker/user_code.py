"""Formatting of errors raised by a task's code, on top of ``fluffle_common.cli.user_code``."""

from __future__ import annotations

from pathlib import Path

from fluffle_common.cli import user_code

CALLERS = frozenset(
    str(Path(__file__).parent / name)
    for name in (
        "frozen.py",
        "job.py",
        "results.py",
        "signature.py",
        "task_loading.py",
        "trainer.py",
    )
)
"""The files that call a task's code; their frames are left out of its tracebacks."""


def full_trace(why: BaseException) -> str:
    """Return the traceback of an error, starting at the first frame of the task's code."""
    return user_code.full_trace(why, CALLERS)


def warn_in_full(why: BaseException) -> None:
    """Write that traceback to stderr."""
    user_code.warn_in_full(why, "task", CALLERS)
