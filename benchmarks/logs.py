"""The logs of the programs under measurement: what happened, and when, to the microsecond."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any


def read_events(log: Path, offset: int) -> tuple[list[tuple[float, dict[str, Any]]], int]:
    """Read the events of ``--log-format json`` that were written behind ``offset``.

    Returns:
        (when, event) of each, in seconds as ``time.time`` counts them, and where to read on.
    """
    with log.open("rb") as lines:
        lines.seek(offset)
        data = lines.read()
    whole = data[: data.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        if line.startswith(b"{"):
            told = json.loads(line)
            events.append((datetime.fromisoformat(told["time"]).timestamp(), told))
    return events, offset + len(whole)
