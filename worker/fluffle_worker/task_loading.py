"""How a task is found: ``module:name`` or ``path.py:name``, from a user's own files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.task import Task, TaskFactory, TaskOptions, check_task
from fluffle_worker.user_code import one_line, warn_in_full

# What the extra ``worker`` brings, by what is imported of it.
_OF_THE_EXTRA = frozenset({"jax", "jaxlib", "flax", "optax", "PIL"})
# Packages that are installed under another name than they are imported by.
_INSTALLED_AS = {
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}


def load_task(name: str, options: TaskOptions) -> Task:
    """Make the task that ``module:name`` or ``path.py:name`` names.

    Raises:
        UsageError: where there is no such thing.
        TaskError: where it fails to make a task of these options, such as for want of data.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise UsageError(f"--task wants module:name or path.py:name, not '{name}'")
    module = _module(where)
    factory: TaskFactory | None = getattr(module, attribute, None)
    if not callable(factory):
        raise UsageError(f"{where} has no function '{attribute}' that makes a task (--task)")
    try:
        task = factory(options)
    except (TaskError, UsageError):
        raise
    except ModuleNotFoundError as why:
        raise _missing(where, why) from None
    except (Exception, SystemExit) as why:
        warn_in_full(why)
        raise TaskError(f"the task {name} cannot start: {one_line(why)}") from why
    return check_task(name, task)


def _module(where: str) -> object:
    try:
        if where.endswith(".py"):
            return _from_file(where)
        with _found_first(""):  # a module beside the user, as `python -m` finds it
            return importlib.import_module(where)
    except ModuleNotFoundError as why:
        if why.name and (where == why.name or where.startswith(f"{why.name}.")):
            raise UsageError(f"there is no module {where} (--task)") from None
        raise _missing(where, why) from None
    except (UsageError, TaskError):
        raise
    except (Exception, SystemExit) as why:
        warn_in_full(why)
        raise TaskError(f"the task's file {where} fails to load: {one_line(why)}") from why


def _from_file(where: str) -> object:
    path = Path(where)
    if not path.is_file():
        raise UsageError(f"there is no file {where} (--task)")
    path = path.resolve()
    name = path.stem
    there = sys.modules.get(name)
    if there is not None and getattr(there, "__file__", None) != str(path):
        name = f"fluffle_task_{name}"  # a file called queue.py is not to replace that module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _found_first(str(path.parent)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _found_first(folder: str) -> Iterator[None]:
    """Let modules of a folder be imported: first of all for now, then after all others.

    What a task imports later, inside its functions, is found too, and what we import later is not
    hidden by a neighbour of the same name.
    """
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _missing(where: str, why: ModuleNotFoundError) -> UsageError:
    """Say which module is missing, and what to install or where to put it."""
    package = (why.name or "").partition(".")[0]
    told = one_line(why)
    place = told[told.rindex("(") :] if told.endswith(")") else ""
    if package in _OF_THE_EXTRA:
        remedy = "pip install 'fluffle[worker]' brings JAX, Flax, optax and pillow"
    else:
        beside = f"beside {where}" if where.endswith(".py") else "in this folder"
        remedy = (
            f"pip install {_INSTALLED_AS.get(package, package)}, or put {package}.py {beside} if "
            "it is a module of your own"
        )
    return UsageError(
        f"the task {where} needs the module '{why.name}', which is not there {place}; {remedy}"
    )
