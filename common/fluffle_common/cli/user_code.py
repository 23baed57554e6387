"""Reporting errors in users' own code: one line for the user, and the traceback on stderr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.user_errors import full_trace, is_ctrl_c, one_line


def warn_in_full(why: BaseException, what: str) -> None:
    """Write the traceback of an error to stderr; ``what`` is the user's code, such as ``task``."""
    warn(f"traceback of the error in the {what}'s code:")
    echo(*full_trace(why).splitlines(), err=True)


def task_error(why: BaseException, failure: str, traced: str = "") -> TaskError:
    """Return the ``TaskError`` for an error in a user's code; its text begins with ``failure``.

    Ctrl-C, which is not an error of the code, is raised again. If ``traced`` names the code, such
    as ``task``, its traceback goes to stderr.
    """
    if is_ctrl_c(why):
        raise why
    if traced:
        warn_in_full(why, traced)
    return TaskError(f"{failure}: {one_line(why)}")


def call_task(failure: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a task's code; an error that is not ours becomes a ``TaskError`` with ``failure``."""
    try:
        return call(*arguments)
    except (TaskError, UsageError):
        raise
    except BaseException as why:
        raise task_error(why, failure) from why
