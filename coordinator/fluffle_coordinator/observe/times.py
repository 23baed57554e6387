"""Times and durations in words."""

from __future__ import annotations

from datetime import UTC, datetime


def iso(at: float | None) -> str | None:
    """Return a time in ISO 8601; None if it is unknown."""
    time = None if at is None else _utc(at)
    return time.isoformat(timespec="milliseconds") if time else None


def clock(at: float) -> str:
    """Return the local time of day."""
    return local(at, "%H:%M:%S")


def local(at: float, form: str) -> str:
    """Return the local time in a format of `strftime`."""
    time = _utc(at)
    return time.astimezone().strftime(form) if time else "?"


def _utc(at: float) -> datetime | None:
    """Return a time in UTC; None if no calendar date can represent it."""
    try:
        return datetime.fromtimestamp(at, UTC)
    except (OverflowError, OSError, ValueError):
        return None


def duration(value: float) -> str:
    """Format a duration in seconds, in suitable units.

    >>> duration(0.0123), duration(3.21), duration(125), duration(7260), duration(0)
    ('12 ms', '3.2 s', '2 min 5 s', '2 h 1 min', '0 s')
    >>> duration(1.7e308)  # as a worker may claim
    '1.7e+308 s'
    """
    if value == 0:
        return "0 s"
    if value < 1:
        return f"{value * 1000:.2g} ms" if value < 0.01 else f"{value * 1000:.0f} ms"
    if value < 60 or value > 1e9:
        return f"{value:.3g} s" if value >= 10 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
