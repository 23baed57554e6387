"""Installed packages: optional dependencies, and plugins in entry point groups ``fluffle.…``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points

from fluffle_common.errors import UsageError


@functools.cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return a group's entry points by name, without importing what they refer to."""
    return {entry.name: entry for entry in entry_points(group=group)}


@contextlib.contextmanager
def needs(
    packages: str, extra: str, error: Callable[[str], Exception] = UsageError
) -> Iterator[None]:
    """Turn the ``ImportError`` of a missing package into one that says what to install.

    Raises:
        UsageError: if a package of the extra ``fluffle[extra]`` is not installed, or cannot be
            imported, as the text then says; or the ``error``.
    """
    try:
        yield
    except ImportError as why:
        broken = not isinstance(why, ModuleNotFoundError)
        cause = f" ({' '.join(str(why).split())[:200]})" if broken else ""
        raise error(f"{packages}{cause}; run pip install 'fluffle[{extra}]'") from None
