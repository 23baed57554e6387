"""The file ``run.json`` of a run: its id, its federation, and its configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluffle_common.clock import timestamp
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


def add_configuration(run: dict[str, Any], configuration: dict[str, Any], committed: int) -> bool:
    """Add a configuration to the content of a ``run.json``, unless it equals the last one.

    Returns:
        Whether it was added; it then holds from the round after ``committed`` on.
    """
    configurations = run.setdefault("configurations", [])
    new = json.loads(json.dumps(configuration))
    if configurations:
        last = configurations[-1]
        when = {"from_round": last["from_round"], "since": last.get("since")}
        # The last one may hold only from a later round on: the run then lost that round's model.
        if last == {**when, **new} and last["from_round"] <= committed + 1:
            return False
    configurations.append({"from_round": committed + 1, "since": timestamp(), **new})
    return True


def _are_configurations(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("from_round"), int)
        and isinstance(one.get("rules", {}), dict)
        and isinstance(one.get("plan", {}), dict)
        for one in value
    )
