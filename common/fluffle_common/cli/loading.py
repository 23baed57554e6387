"""Loading users' own tasks, strategies, codecs and rules.

``module:name`` or ``path.py:name`` names an object in a user's own code. An installed package
offers one by an entry point.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from fluffle_common.cli.user_code import task_error
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.user_errors import one_line

# What an extra of fluffle brings, for the import names of its packages.
_OF_THE_WORKER = "'fluffle[worker]', which includes JAX, Flax, optax and pillow"
_OF_AN_EXTRA = {
    **dict.fromkeys(("jax", "jaxlib", "flax", "optax", "PIL"), _OF_THE_WORKER),
    "torch": "'fluffle[torch]', which includes PyTorch",
}


# Files that several options name are loaded once, as modules are, so that they share their globals.
_loaded: dict[Path, tuple[tuple[int, int], ModuleType]] = {}


@dataclass(frozen=True)
class Place:
    """The place of an object in a user's code."""

    what: str  # what the object is used for, such as ``task``; also the name of the option
    where: str  # the name of the module, or the path of the file
    attribute: str  # the name of the object in it

    @classmethod
    def parse(cls, what: str, name: str) -> Place:
        """Parse ``module:name`` or ``path.py:name``; raise ``UsageError`` for other text."""
        where, colon, attribute = name.rpartition(":")
        if where.endswith(".ipynb"):
            raise UsageError(
                f"--{what} cannot load the notebook {where}; export it with 'jupyter nbconvert "
                f"--to script {where}', and give {where.removesuffix('ipynb')}py:{attribute}"
            )
        path = Path(where)  # if this is not a file, it is the name of a module
        no_module = where.startswith(".") or len(path.parts) > 1 or (path.suffix and path.is_file())
        if not (colon and where and attribute) or (no_module and path.suffix != ".py"):
            raise UsageError(f"--{what} expects module:name or path.py:name, not '{name}'")
        return cls(what, where, attribute)

    @property
    def is_file(self) -> bool:
        """Whether this is a path, not the name of a module."""
        return self.where.endswith(".py")

    def load(self) -> Any:
        """Import the module and return the object, which is not None.

        Raises:
            UsageError: if the module, the file or the object does not exist, or a module that it
                needs is missing.
            TaskError: if its own code fails; the traceback goes to stderr.
        """
        loaded = getattr(self._module(), self.attribute, None)
        if loaded is None:
            raise UsageError(
                f"{self.where} has no '{self.attribute}'; correct the name in --{self.what}"
            )
        return loaded

    @property
    def called(self) -> str:
        """The name for display, without the folder of the file."""
        return f"{Path(self.where).name if self.is_file else self.where}:{self.attribute}"

    def missing(self, why: ModuleNotFoundError) -> UsageError:
        """Return an error that names the missing module and how to install it."""
        package = (why.name or "").partition(".")[0]
        text = one_line(why)
        place = f" {text[text.rindex('(') :]}" if text.endswith(")") else ""
        if package in _OF_AN_EXTRA:
            remedy = f"run pip install {_OF_AN_EXTRA[package]}"
        else:
            beside = f"beside {self.where}" if self.is_file else "in this folder"
            remedy = (
                "install the package that provides it or, if the module is your own, put "
                f"{package}.py {beside}"
            )
        return UsageError(
            f"the {self.what} {self.where} needs the module '{why.name}', which is not installed"
            f"{place}; {remedy}"
        )

    def _module(self) -> object:
        try:
            if self.is_file:
                return self._from_file()
            with _searched_first(""):  # modules in the current folder, as with `python -m`
                return importlib.import_module(self.where)
        except ModuleNotFoundError as why:
            if why.name and (self.where == why.name or self.where.startswith(f"{why.name}.")):
                raise UsageError(
                    f"there is no module {self.where}; correct the module in --{self.what}"
                ) from None
            raise self.missing(why) from None
        except (UsageError, TaskError):
            raise
        except BaseException as why:
            failure = f"the {self.what}'s file {self.where} fails to load"
            raise task_error(why, failure, self.what) from why

    def _from_file(self) -> object:
        path = Path(self.where)
        if not path.is_file():
            raise UsageError(f"there is no file {self.where}; correct the path in --{self.what}")
        path = path.resolve()
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)
        if (known := _loaded.get(path)) is not None:
            loaded_version, module = known
            if loaded_version == version and sys.modules.get(module.__name__) is module:
                return module
        name = path.stem
        if _is_another_module(name, path):
            name = f"fluffle_{self.what}_{name}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            with _searched_first(str(path.parent)):
                spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)  # the file may have removed it itself
            raise
        _loaded[path] = version, module
        return module


def load_installed(what: str, point: EntryPoint) -> Any:
    """Import the object of an entry point for ``what``; raise ``TaskError`` if its code fails."""
    try:
        return point.load()
    except BaseException as why:
        failure = f"the {what} '{point.name}' (entry point {point.value}) fails to load"
        raise task_error(why, failure, what) from why


def load_object(name: str, option: str) -> Any:
    """Return the object that ``path.py:name`` names.

    ``option`` is the one that it was given to, such as ``--codec``.

    Raises:
        UsageError: if the file does not exist or has no such attribute.
        TaskError: if the file fails to load.
    """
    if not name.rpartition(":")[0].endswith((".py", ".ipynb")):
        raise UsageError(f"{option} expects path.py:name, not '{name}'")
    return Place.parse(option.removeprefix("--"), name).load()


def load_codec(name: str, option: str) -> str:
    """Register the codec at ``path.py:name``; return its name. Raise what ``load_object`` does."""
    from fluffle_common.tensors.codecs.registry import CODECS

    return CODECS.add(load_object(name, option), f"{name} ({option})").name


@contextlib.contextmanager
def _searched_first(folder: str) -> Iterator[None]:
    """Put a folder at the start of ``sys.path``, and on exit at the end.

    Imports inside the user's functions then still find modules in the folder, but these do not
    shadow modules that fluffle imports later. Folders that the user's code removes come back at
    the end, because fluffle imports from them.
    """
    before = list(sys.path)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.extend(one for one in [*before, folder] if one not in sys.path)


def _is_another_module(name: str, path: Path) -> bool:
    """Whether a name belongs to a module that a user's file must not replace.

    That module need not be loaded yet: a user's uvloop.py must not replace the module uvloop.
    """
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # "a.b" without a package a; a module without a spec
        return name in sys.modules
    return found is not None and (found.origin is None or Path(found.origin).resolve() != path)
