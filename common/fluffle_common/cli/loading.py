"""How an object that is not ours is found.

``module:name`` or ``path.py:name`` names one in a user's own files; an installed package offers it
by an entry point.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from fluffle_common.cli.user_code import one_line, warn_in_full
from fluffle_common.errors import TaskError, UsageError

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


@dataclass(frozen=True)
class Place:
    """Where a user's object is.

    Args:
        what: what it is to be, such as ``task``; the option that names it is called the same.
        where: the module, or the path of the file.
        attribute: its name there.
    """

    what: str
    where: str
    attribute: str

    @classmethod
    def parse(cls, what: str, name: str) -> Place:
        """Take ``module:name`` or ``path.py:name`` apart.

        Raises:
            UsageError: where it is neither.
        """
        where, colon, attribute = name.rpartition(":")
        if not colon or not where or not attribute:
            raise UsageError(f"--{what} expects module:name or path.py:name, not '{name}'")
        return cls(what, where, attribute)

    @property
    def is_file(self) -> bool:
        """Whether it is in a file, and not in a module that is imported by its name."""
        return self.where.endswith(".py")

    def load(self, callers: Collection[str] = ()) -> object:
        """Import the module and return the object; None where the module has none of that name.

        Args:
            callers: our files on the way here, which no traceback need show.

        Raises:
            UsageError: where there is no such module or file, or a module that it needs is missing.
            TaskError: where its own code fails; its traceback goes to stderr.
        """
        return getattr(self._module({*callers, __file__}), self.attribute, None)

    def found(self, callers: Collection[str] = ()) -> Any:
        """Return the object, as ``load`` does.

        Raises:
            UsageError: if there is none of this name, besides.
            TaskError: as ``load`` does.
        """
        found = self.load(callers)
        if found is None:
            raise UsageError(f"{self.where} has no '{self.attribute}' (--{self.what})")
        return found

    @property
    def called(self) -> str:
        """What it is called, wherever its file lies."""
        return f"{Path(self.where).name if self.is_file else self.where}:{self.attribute}"

    def missing(self, why: ModuleNotFoundError) -> UsageError:
        """Say which module is missing, and what to install or where to put it."""
        package = (why.name or "").partition(".")[0]
        told = one_line(why)
        place = told[told.rindex("(") :] if told.endswith(")") else ""
        if package in _OF_THE_EXTRA:
            remedy = "pip install 'fluffle[worker]' brings JAX, Flax, optax and pillow"
        else:
            beside = f"beside {self.where}" if self.is_file else "in this folder"
            remedy = (
                f"pip install {_INSTALLED_AS.get(package, package)}, or put {package}.py {beside} "
                "if it is a module of your own"
            )
        return UsageError(
            f"the {self.what} {self.where} needs the module '{why.name}', which is not there "
            f"{place}; {remedy}"
        )

    def _module(self, callers: Collection[str]) -> object:
        try:
            if self.is_file:
                return self._from_file()
            with _found_first(""):  # a module beside the user, as `python -m` finds it
                return importlib.import_module(self.where)
        except ModuleNotFoundError as why:
            if why.name and (self.where == why.name or self.where.startswith(f"{why.name}.")):
                raise UsageError(f"there is no module {self.where} (--{self.what})") from None
            raise self.missing(why) from None
        except (UsageError, TaskError):
            raise
        except (Exception, SystemExit) as why:
            warn_in_full(why, self.what, callers)
            raise TaskError(
                f"the {self.what}'s file {self.where} fails to load: {one_line(why)}"
            ) from why

    def _from_file(self) -> object:
        path = Path(self.where)
        if not path.is_file():
            raise UsageError(f"there is no file {self.where} (--{self.what})")
        path = path.resolve()
        name = path.stem
        there = sys.modules.get(name)
        if there is not None and getattr(there, "__file__", None) != str(path):
            # A file called queue.py is not to replace that module.
            name = f"fluffle_{self.what}_{name}"
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


def load_installed(what: str, point: EntryPoint, callers: Collection[str] = ()) -> Any:
    """Import what an installed package offers.

    Args:
        what: what it is to be, such as ``strategy``.
        point: where it is.
        callers: our files on the way here, which no traceback need show.

    Raises:
        TaskError: if its own code fails; its traceback goes to stderr.
    """
    try:
        return point.load()
    except (Exception, SystemExit) as why:
        warn_in_full(why, what, {*callers, __file__})
        raise TaskError(
            f"the {what} {point.name} of {point.value} fails to load: {one_line(why)}"
        ) from why


@contextlib.contextmanager
def _found_first(folder: str) -> Iterator[None]:
    """Let modules of a folder be imported: first of all for now, then after all others.

    What a user's code imports later, inside its functions, is found too, and what we import later
    is not hidden by a neighbour of the same name.
    """
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
