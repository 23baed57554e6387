"""Calls of a task's code, and the errors that they end in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluffle_common.cli.user_code import task_error
from fluffle_common.errors import TaskError, UsageError


def call_task(failure: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a task's code and return its result; the text of an error begins with ``failure``.

    Raises:
        TaskError: if it raises an exception, other than fluffle's own for users.
    """
    try:
        return call(*arguments)
    except (TaskError, UsageError):
        raise
    except BaseException as why:
        raise task_error(why, failure) from why


class FailedMetric(float):
    """NaN, in place of a metric whose function failed; ``why`` is its error."""

    why: BaseException

    def __new__(cls, why: BaseException) -> FailedMetric:
        """Return NaN with this error."""
        made = super().__new__(cls, "nan")
        made.why = why
        return made
