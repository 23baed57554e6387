"""Errors of a task's own code; see ``fluffle_common.cli.user_code``."""

from __future__ import annotations

from pathlib import Path

from fluffle_common.cli import user_code
from fluffle_common.cli.user_code import one_line, sendable

__all__ = ["CALLERS", "full_trace", "one_line", "sendable", "warn_in_full"]

CALLERS = frozenset(
    str(Path(__file__).parent / name)
    for name in ("job.py", "results.py", "signature.py", "task_loading.py", "trainer.py")
)
"""What calls a task's code: no part of its story."""


def full_trace(why: BaseException) -> str:
    """Return the whole traceback of an error, from the first line of the task's code on."""
    return user_code.full_trace(why, CALLERS)


def warn_in_full(why: BaseException) -> None:
    """Write the whole traceback of an error to stderr."""
    user_code.warn_in_full(why, "task", CALLERS)
