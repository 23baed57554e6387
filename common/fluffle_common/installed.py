"""What installed packages add to fluffle: by entry points, each in a group named ``fluffle.…``."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points


@functools.cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by their names; nothing of them is imported yet."""
    return {found.name: found for found in entry_points(group=group)}
