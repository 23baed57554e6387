"""Formatting of errors raised by a task's code, on top of ``fluffle_common.cli.user_code``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluffle_common.cli import user_code
from fluffle_common.errors import TaskError


def call_task(name: str, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a part of a task's code and return its result; ``what`` names the part in errors.

    Raises:
        TaskError: if it raises an exception.
    """
    try:
        return call(*arguments)
    except TaskError:
        raise
    except BaseException as why:
        if user_code.is_ctrl_c(why):
            raise
        raise TaskError(f"{what} of the task {name} fails: {user_code.one_line(why)}") from why


class FailedMetric(float):
    """NaN, in place of a metric whose function failed; ``why`` is its error."""

    why: BaseException

    def __new__(cls, why: BaseException) -> FailedMetric:
        """Return NaN with this error."""
        made = super().__new__(cls, "nan")
        made.why = why
        return made
