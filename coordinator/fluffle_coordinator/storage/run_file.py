"""The file ``run.json`` of a run: its id, its federation, its configurations and its starts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fluffle_common.clock import timestamp
from fluffle_common.durable_files import open_regular, replacing
from fluffle_common.errors import UsageError
from fluffle_common.protocol.messages.base import Model
from fluffle_common.protocol.messages.fields import Round, Train

RUN_FILE = "run.json"


class _Plan(Model):
    train: Train | None = None


class _Configuration(Model):
    from_round: Round
    rules: dict[str, Any] = Field(default_factory=dict)
    plan: _Plan = _Plan()


class _RunFile(Model):
    """The fields that are read; a later version may write more."""

    starts: Annotated[int, Field(ge=0, le=10**9)] = 0
    configurations: list[_Configuration] = Field(default_factory=list)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder's ``run.json``; empty if there is none.

    Raises:
        UsageError: if it cannot be read, or no coordinator writes such content.
    """
    path = folder / RUN_FILE
    try:
        with open(path, "rb", opener=open_regular) as file:
            content: dict[str, Any] = json.load(file)
        _RunFile.model_validate(content)
    except FileNotFoundError:
        return {}
    except ValidationError:
        raise UsageError(f"{path} cannot be read (the file does not describe a run)") from None
    except (OSError, ValueError, RecursionError) as why:
        raise UsageError(f"{path} cannot be read ({why})") from None
    return content


def write_run_file(folder: Path, run: dict[str, Any]) -> None:
    """Write the content of a ``run.json``."""
    with replacing(folder / RUN_FILE) as file:
        file.write(json.dumps(run, indent=1).encode() + b"\n")


def count_start(folder: Path) -> int:
    """Count a start of a run's coordinator; return how many starts were counted before.

    A start on a full disk is not counted, so that it waits for room only when it has to write.
    """
    run = read_run_file(folder)
    before: int = run.get("starts", 0)
    if run:
        with contextlib.suppress(OSError):
            write_run_file(folder, {**run, "starts": before + 1})
    return before


def add_configuration(run: dict[str, Any], configuration: dict[str, Any], committed: int) -> bool:
    """Add a configuration to the content of a ``run.json``; return False if it is the last one."""
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
