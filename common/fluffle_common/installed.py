"""Plugins: what installed packages offer under entry point groups named ``fluffle.…``."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points


@functools.cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return a group's entry points by name, without importing what they refer to."""
    return {entry.name: entry for entry in entry_points(group=group)}
