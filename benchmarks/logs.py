"""Reader of the JSON logs of the programs under measurement."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any


def read_events(log: Path, offset: int) -> tuple[list[tuple[float, dict[str, Any]]], int]:
    """Read the events that ``--log-format json`` has written since ``offset``.

    Returns:
        A list of (time, event), with times as of ``time.time``, and the offset to continue from.
    """
    with log.open("rb") as lines:
        lines.seek(offset)
        data = lines.read()
    whole = data[: data.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        if line.startswith(b"{"):
            event = json.loads(line)
            events.append((datetime.fromisoformat(event["time"]).timestamp(), event))
    return events, offset + len(whole)
