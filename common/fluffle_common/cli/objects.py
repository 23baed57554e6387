"""Objects from a user's own file, named on the command line as ``path.py:name``."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.codecs.registry import CODECS


def load_object(name: str, option: str) -> Any:
    """Return what ``path.py:name`` names.

    Args:
        name: the file, and the name in it.
        option: the option that names it, for errors.

    Raises:
        UsageError: if there is no such file, or nothing of this name in it.
        TaskError: if the file fails to load.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where.endswith(".py") or not attribute:
        raise UsageError(f"{option} is '{name}'; path.py:name is expected")
    path = Path(where)
    if not path.is_file():
        raise UsageError(f"there is no file {where} ({option})")
    module = _load(path.resolve(), where, option)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UsageError(f"{where} has nothing called '{attribute}' ({option})") from None


def load_codec(name: str, option: str) -> str:
    """Let this process use the codec that ``path.py:name`` names; return its own name.

    Raises:
        UsageError: if there is no such codec, or it is none.
        TaskError: if its file fails to load.
    """
    return CODECS.add(load_object(name, option), f"{name} ({option})").name


def _load(path: Path, where: str, option: str) -> ModuleType:
    name = f"fluffle_user_{path.stem}"  # so that it replaces no module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its neighbours are found, and hide no module of ours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as why:
        del sys.modules[name]
        raise _failed(why, path, where, option) from why
    return module


def _failed(why: BaseException, path: Path, where: str, option: str) -> TaskError:
    """Show the traceback of the user's own code; return the error that says it in one line."""
    trace, line = why.__traceback__, ""
    for frame in traceback.extract_tb(trace):
        if frame.filename == str(path):
            line = f" ({path.name}:{frame.lineno})"
    while trace is not None and trace.tb_next and trace.tb_frame.f_code.co_filename != str(path):
        trace = trace.tb_next
    warn(f"the error in {where}:")
    lines = "".join(traceback.format_exception(type(why), why, trace)).splitlines()
    echo(*(one.encode(errors="backslashreplace").decode() for one in lines), err=True)
    text = " ".join(f"{type(why).__name__}: {why}".split())[:300]
    return TaskError(f"the file {where} fails to load: {text}{line} ({option})")
