"""The time: as everything that is written down has it, and as everybody waits by.

A loop may have a time of its own, as that of a simulation has. Whatever runs on it reads that.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class OwnTime(Protocol):
    """An event loop with a time of its own; ``time()`` is its monotonic clock."""

    def time(self) -> float:
        """Return seconds of a clock that never goes back."""

    def wall_time(self) -> float:
        """Return seconds since 1970, UTC."""


def _own_time() -> OwnTime | None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    return loop if hasattr(loop, "wall_time") else None


def monotonic() -> float:
    """Return seconds of a clock that never goes back."""
    own = _own_time()
    return time.monotonic() if own is None else own.time()


def wall_time() -> float:
    """Return seconds since 1970, UTC."""
    own = _own_time()
    return time.time() if own is None else own.wall_time()


def timestamp(timespec: str = "milliseconds") -> str:
    """Return the time now, UTC, as ISO 8601."""
    return datetime.fromtimestamp(wall_time(), UTC).isoformat(timespec=timespec)
