"""The file ``run.json`` of a run: its id, its federation, and its configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluffle_common.errors import UsageError

RUN_FILE = "run.json"


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder's ``run.json``; empty if there is none.

    Raises:
        UsageError: if it cannot be read, or no coordinator writes such content.
    """
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as why:
        raise UsageError(f"{path} cannot be read ({why})") from None
    if not isinstance(content, dict) or not _are_configurations(content.get("configurations", [])):
        raise UsageError(f"{path} cannot be read (the file does not describe a run)")
    return content


def _are_configurations(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("from_round"), int)
        and isinstance(one.get("rules", {}), dict)
        and isinstance(one.get("plan", {}), dict)
        for one in value
    )
