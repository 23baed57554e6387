"""Describing errors in users' own code, in one line or with the traceback."""

from __future__ import annotations

import importlib
import re
import signal
import sysconfig
import threading
import traceback
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from fluffle_common.errors import TaskError

_OURS = frozenset({"fluffle_broker", "fluffle_common", "fluffle_coordinator", "fluffle_worker"})
_LIKE_USERS = ("letters", "local", "tasks")  # fluffle's own tasks and local rules
_IMPORTS = ("<frozen ", importlib.__file__)  # Python's own files that import modules
_LONGEST = 500
_LONGEST_TRACE = 100_000


def one_line(why: BaseException) -> str:
    """Return an error in a user's code in one line, with its file and line.

    A ``TaskError`` is not raised *in* the user's code, so its text is returned without a place.
    """
    try:
        text = " ".join(_without_trace(_shortened(str(why))).split())
    except BaseException:  # its own __str__ fails
        text = ""
    if not isinstance(why, TaskError):
        text = f"{type(why).__name__}: {text}" if text else type(why).__name__
        where = place_of(why)
        if where:
            return f"{sendable(text, _LONGEST - len(where) - 3)} ({where})"
    return sendable(text, _LONGEST)


def place_of(why: BaseException) -> str:
    """Return the innermost place in the user's own files, such as ``file.py:12``; may be empty.

    The folders are left out, because they belong to the data owner's machine.
    """
    if isinstance(why, SyntaxError):
        return ""  # its text says where
    trace = traceback.extract_tb(why.__traceback__)
    frames = [f for f in trace if not (_is_ours(f.filename) or f.filename.startswith(_IMPORTS))]
    own = [frame for frame in frames if _is_users(frame.filename)]
    if not frames:
        return ""
    last = (own or frames)[-1]
    return f"{sendable(Path(last.filename).name, 100)}:{last.lineno}"


def users_trace(why: BaseException) -> TracebackType | None:
    """Return the traceback of an error without the frames that only call the user's code."""
    trace = why.__traceback__
    while trace is not None and _only_calls(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def full_trace(why: BaseException) -> str:
    """Return ``users_trace`` as text, with the error."""
    lines = traceback.format_exception(type(why), why, users_trace(why))
    return sendable(_shortened("".join(lines).rstrip()))


def is_ctrl_c(why: BaseException) -> bool:
    """Whether Ctrl-C may have raised this, so that it is not an error of the user's code.

    Python raises ``KeyboardInterrupt`` for the signal only in the main thread, and only until a
    running event loop has taken over SIGINT.
    """
    return (
        isinstance(why, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def sendable(text: str, longest: int | None = None) -> str:
    """Return a text of at most ``longest`` characters that can be encoded as UTF-8."""
    return text[:longest].encode(errors="backslashreplace").decode()[:longest]


def _shortened(text: str) -> str:
    """Return a text without its middle if it is too long, as one that quotes an array may be."""
    left_out = len(text) - _LONGEST_TRACE
    if left_out <= 0:
        return text
    half = _LONGEST_TRACE // 2
    return f"{text[:half]}\n… {left_out} characters omitted …\n{text[-half:]}"


def _without_trace(text: str) -> str:
    """Return the text of an error without the traceback that it quotes, but with its last lines.

    PyTorch's ``DataLoader`` quotes the whole traceback of an error in one of its processes.
    """
    found = re.search(r"^(Original )?Traceback \(most recent call last\):\n", text, re.M)
    if found is None:
        return text
    lines = text[found.end() :].splitlines()
    last = max((n for n, line in enumerate(lines) if line.startswith("  ")), default=-1)
    return "\n".join([text[: found.start()], *lines[last + 1 :]])


def _only_calls(filename: str) -> bool:
    """Whether a file only calls the code of tasks and the like, and has none itself."""
    return filename.startswith("<frozen ") or (
        _is_ours(filename) and Path(filename).parent.name not in _LIKE_USERS
    )


@cache
def _is_ours(filename: str) -> bool:
    path = Path(filename)
    if _OURS & set(path.parts):
        return True
    # Not by its name: the folder of a clone, and thus of its examples, is called fluffle too.
    front_door = find_spec("fluffle")
    folders = (front_door and front_door.submodule_search_locations) or ()
    return any(path.is_relative_to(folder) for folder in folders)


@cache
def _is_users(filename: str) -> bool:
    path = Path(filename)
    if filename.startswith("<") or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    libraries = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return not any(path.is_relative_to(library) for library in libraries)
