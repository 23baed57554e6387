"""The time as everything that is written down has it."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(timespec: str = "milliseconds") -> str:
    """Return the time now, UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=timespec)
