"""Errors of a user's own code: where they happened, in one line and in full."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Collection
from functools import cache
from pathlib import Path
from types import TracebackType

from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo
from fluffle_common.errors import TaskError

_OURS = frozenset({"fluffle_broker", "fluffle_common", "fluffle_coordinator", "fluffle_worker"})
_LONGEST = 500


def one_line(why: BaseException) -> str:
    """Return an error of a user's code in one line, with the file and line that it comes from.

    What fluffle itself says of a task is not an error *in* its code, and stands as it is.
    """
    try:
        text = " ".join(str(why).split())
    except Exception:  # its own __str__ fails
        text = ""
    if not isinstance(why, TaskError):
        text = f"{type(why).__name__}: {text}" if text else type(why).__name__
        where = _where(why)
        if where:
            return f"{sendable(text, _LONGEST - len(where) - 3)} ({where})"
    return sendable(text, _LONGEST)


def full_trace(why: BaseException, callers: Collection[str]) -> str:
    """Return the whole traceback of an error, from the first line of the user's code on.

    Args:
        why: the error.
        callers: our files that call a user's code, which are no part of its story.
    """
    trace = why.__traceback__
    while trace is not None and trace.tb_next is not None and _leads_there(trace, callers):
        trace = trace.tb_next
    return sendable("".join(traceback.format_exception(type(why), why, trace)).rstrip())


def warn_in_full(why: BaseException, what: str, callers: Collection[str]) -> None:
    """Write the whole traceback of an error to stderr.

    Args:
        why: the error.
        what: whose code it is in, such as ``task``.
        callers: see ``full_trace``.
    """
    warn(f"the error in the {what}'s code:")
    echo(*full_trace(why, callers).splitlines(), err=True)


def sendable(text: str, longest: int | None = None) -> str:
    """Return text that can be encoded, of at most this length: not every file name can."""
    return text[:longest].encode(errors="backslashreplace").decode()[:longest]


def _leads_there(trace: TracebackType, callers: Collection[str]) -> bool:
    name = trace.tb_frame.f_code.co_filename
    return name in callers or name.startswith("<frozen ")


def _where(why: BaseException) -> str:
    """Return ``file.py:12``, the last line of the user's own files that the error went through.

    Only the file's name: the folders of a data owner's machine are nobody else's business.
    """
    if isinstance(why, SyntaxError):
        return ""  # its text says where
    frames = traceback.extract_tb(why.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)]
    if not frames:
        return ""
    last = (own or frames)[-1]
    return f"{sendable(Path(last.filename).name, 100)}:{last.lineno}"


@cache
def _is_users(filename: str) -> bool:
    path = Path(filename)
    if filename.startswith("<") or {"site-packages", "dist-packages", *_OURS} & set(path.parts):
        return False
    libraries = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return not any(path.is_relative_to(library) for library in libraries)
