"""The clocks of the process: monotonic time for measuring, wall-clock time for recording.

An event loop that simulates time, such as that of ``fluffle simulate``, replaces both clocks for
everything that runs on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Protocol


class SimulatedTime(Protocol):
    """An event loop that has its own monotonic and wall clocks."""

    def time(self) -> float:
        """Return monotonic seconds."""

    def wall_time(self) -> float:
        """Return seconds since 1970, UTC."""


class _Thread(threading.local):
    """Which time the code in a thread runs in; None if it is real."""

    simulated: SimulatedTime | None = None


_thread = _Thread()


@contextlib.contextmanager
def in_time_of(simulated: SimulatedTime) -> Iterator[None]:
    """Replace both clocks in this thread until the context ends."""
    before, _thread.simulated = _thread.simulated, simulated
    try:
        yield
    finally:
        _thread.simulated = before


def monotonic() -> float:
    """Return monotonic seconds, real or simulated."""
    simulated = _thread.simulated
    return time.monotonic() if simulated is None else simulated.time()


def wall_time() -> float:
    """Return seconds since 1970, UTC, real or simulated."""
    simulated = _thread.simulated
    return time.time() if simulated is None else simulated.wall_time()


def timestamp(timespec: str = "milliseconds", at: float | None = None) -> str:
    """Return a UTC time in ISO 8601 format: ``at`` in seconds since 1970, by default now."""
    return datetime.fromtimestamp(wall_time() if at is None else at, UTC).isoformat(
        timespec=timespec
    )


def time_is_simulated() -> bool:
    """Whether this thread runs in simulated time."""
    return _thread.simulated is not None


async def real_sleep(seconds: float) -> None:
    """Sleep in real time, for something outside of the process, such as room on the disk.

    A simulation stands still meanwhile.
    """
    if time_is_simulated():
        time.sleep(seconds)  # noqa: ASYNC251 - nothing else may run, or simulated time would pass
        seconds = 0.0
    await asyncio.sleep(seconds)
