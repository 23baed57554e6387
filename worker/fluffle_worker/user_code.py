"""Formatting of errors raised by a task's code, on top of ``fluffle_common.cli.user_code``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluffle_common.cli import user_code
from fluffle_common.errors import TaskError, UsageError

CALLERS = frozenset(
    str(Path(__file__).parent / name)
    for name in (
        "frozen.py",
        "job.py",
        "results.py",
        "signature.py",
        "task_loading.py",
        "trainer.py",
        "user_code.py",
    )
)
"""The files that call a task's code; their frames are left out of its tracebacks."""


def call_task(failure: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a task's code and return its result; ``failure`` is what it means if that fails.

    Raises:
        TaskError: if it raises an exception, other than fluffle's own for users.
    """
    try:
        return call(*arguments)
    except (TaskError, UsageError):
        raise
    except BaseException as why:
        if user_code.is_ctrl_c(why):
            raise
        raise TaskError(f"{failure}: {user_code.one_line(why)}") from why


def full_trace(why: BaseException) -> str:
    """Return the traceback of an error, starting at the first frame of the task's code."""
    return user_code.full_trace(why, CALLERS)


def warn_in_full(why: BaseException) -> None:
    """Write that traceback to stderr."""
    user_code.warn_in_full(why, "task", CALLERS)


class FailedMetric(float):
    """NaN, in place of a metric whose function failed; ``why`` is its error."""

    why: BaseException

    def __new__(cls, why: BaseException) -> FailedMetric:
        """Return NaN with this error."""
        made = super().__new__(cls, "nan")
        made.why = why
        return made
