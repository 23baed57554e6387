"""The real ``fluffle``, each line of its output led by the time on the monotonic clock.

``python -m benchmarks.stamped coordinator …`` is ``fluffle coordinator …``; its own timestamps end
at milliseconds, and a round of a small model is over in a few of those.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import IO, Any


class Stamped:
    """A text stream that writes the time before each line.

    Args:
        stream: where it all goes.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._at_start = stream, True

    def write(self, text: str) -> int:
        """Write whole lines, or the last part of one."""
        stamp = f"{time.monotonic():.6f} " if self._at_start and text else ""
        self._at_start = text.endswith("\n")
        return self._stream.write(stamp + text) - len(stamp)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def read_events(log: Path, offset: int) -> tuple[list[tuple[float, dict[str, Any]]], int]:
    """Read the events of ``--log-format json`` that were written behind ``offset``.

    Returns:
        (when, event) of each, and where to read on.
    """
    with log.open("rb") as lines:
        lines.seek(offset)
        data = lines.read()
    whole = data[: data.rfind(b"\n") + 1]
    events = []
    for line in whole.decode().splitlines():
        when, _, told = line.partition(" ")
        if told.startswith("{"):
            events.append((float(when), json.loads(told)))
    return events, offset + len(whole)


def main() -> None:
    """Run fluffle."""
    from fluffle_common.cli import main as fluffle

    sys.stdout = Stamped(sys.stdout)
    fluffle()


if __name__ == "__main__":
    main()
