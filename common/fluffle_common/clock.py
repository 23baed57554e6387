"""The clocks of the process: monotonic time for measuring, wall-clock time for recording.

An event loop that simulates time, such as that of ``fluffle simulate``, replaces both clocks for
everything that runs on it.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class SimulatedTime(Protocol):
    """An event loop that has its own monotonic and wall clocks."""

    def time(self) -> float:
        """Return monotonic seconds."""

    def wall_time(self) -> float:
        """Return seconds since 1970, UTC."""


def _simulated_time() -> SimulatedTime | None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    return loop if hasattr(loop, "wall_time") else None


def monotonic() -> float:
    """Return monotonic seconds, real or simulated."""
    simulated = _simulated_time()
    return time.monotonic() if simulated is None else simulated.time()


def wall_time() -> float:
    """Return seconds since 1970, UTC, real or simulated."""
    simulated = _simulated_time()
    return time.time() if simulated is None else simulated.wall_time()


def timestamp(timespec: str = "milliseconds") -> str:
    """Return the current UTC time in ISO 8601 format."""
    return datetime.fromtimestamp(wall_time(), UTC).isoformat(timespec=timespec)
