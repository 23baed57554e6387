"""The history of a run, ``history.jsonl``: a line per commit and evaluation, fsynced.

A crash may leave a torn last line. It is cut off when the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, InstanceOf, ValidationError

from fluffle_common.cli.console import json_line
from fluffle_common.durable_files import open_regular, replacing, sync_folder
from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol.messages.base import Model
from fluffle_common.protocol.messages.fields import Metric, NumExamples, Round, Sequence
from fluffle_coordinator.storage.round_stats import add_uncounted
from fluffle_coordinator.storage.run_checkpoints import checkpoint_files
from fluffle_coordinator.storage.run_file import RUN_FILE

_NAME = "history.jsonl"

# --- the form of the lines ----------------------------------------------------------------------
# The fields that readers use, and their types. A line may have more fields: metrics under any
# name, and the fields of later versions.

_Text = InstanceOf[str]  # a file name in it may not be valid Unicode, which pydantic's str refuses
_Count = Annotated[int, Field(ge=0)]
_Time = Annotated[_Text, AfterValidator(lambda text: datetime.fromisoformat(text).timestamp())]
_Metrics = dict[_Text, Metric | None]  # None stands for a value that is not finite


class _Participant(Model):
    worker: _Text
    num_examples: NumExamples
    sequence: Sequence
    train_loss: Metric | None
    seconds: Metric | None
    counted_s: Metric
    bytes: _Count
    norm: Metric | None
    staleness: _Count = 0
    discount: Annotated[Metric, Field(gt=0, le=1)] = 1.0
    weight: Metric | None = None
    metrics: _Metrics = Field(default_factory=dict)


class _Late(Model):
    worker: _Text
    round: Round


class _Line(Model):
    event: _Text
    round: Round


class _Counting(_Line):
    late: _Count
    rejected: _Count
    late_updates: list[_Late]
    rejections: list[dict[_Text, Any]]


class _Committed(_Counting):
    round: Annotated[Round, Field(ge=1)]
    run: _Text
    base: _Text
    asked: list[_Text]
    participants: list[_Participant]
    opened_at: _Time
    committed_at: _Time
    checkpoint: _Text
    strategy: _Text
    epsilon: Metric | None = None
    delta: Metric | None = None
    timings: dict[_Text, Metric]


class _Evaluation(Model):
    worker: _Text
    num_examples: _Count
    loss: Metric | None
    metrics: _Metrics = Field(default_factory=dict)


class _Evaluated(_Line):
    loss: Metric | None
    num_examples: _Count
    evaluators: list[_Text]
    evaluations: list[_Evaluation]


class _Ended(_Counting):
    outcome: _Text
    reason: _Text


_FORMS: dict[str, type[_Line]] = {"committed": _Committed, "evaluated": _Evaluated, "ended": _Ended}
# The event whose lines have a field. In any other line, nobody has checked it.
_OWNERS = {
    name: event
    for event in ("committed", "evaluated")
    for name in _FORMS[event].model_fields.keys() - _Line.model_fields.keys()
}


def check_line(line: Any) -> None:
    """Check the fields of a history line; ``ValueError`` names the first invalid or missing one."""
    event = line.get("event") if isinstance(line, dict) else None
    try:
        _FORMS.get(event if isinstance(event, str) else "", _Line).model_validate(line)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(".".join(map(str, first["loc"])) or "no object") from None


# --- the file -----------------------------------------------------------------------------------


class History:
    """The history in a run folder, as the run's coordinator writes it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME
        self._begun = False  # from then on, a missing file was removed

    def append(self, line: dict[str, Any]) -> None:
        """Append a line; it is on disk when this returns.

        Raises:
            OSError: if it cannot be written; no part of the line is left in the file.
        """
        data = _encoded([line])
        written = 0
        create = 0 if self._begun else os.O_CREAT
        history = os.open(self.path, os.O_WRONLY | os.O_APPEND | create, 0o666)
        try:
            is_new = not os.fstat(history).st_size
            written = os.write(history, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(history)
            self._begun = True
            if is_new:
                sync_folder(self.path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(history, os.fstat(history).st_size - written)
            raise
        finally:
            os.close(history)

    def read(self) -> tuple[list[dict[str, Any]], bytes]:
        """Read the history.

        Returns:
            The lines, and a last line that a crash or a power failure left incomplete, if any.

        Raises:
            RunError: if any other line is damaged.
        """
        self._begun = self.path.exists()
        try:
            return _read(self.path)
        except ValueError as error:
            raise RunError(
                f"{self.path}: {error}; repair the file, or start a new run with --fresh"
            ) from None

    def cut_off(self, incomplete: bytes) -> None:
        """Move an incomplete last line to ``history.removed.jsonl``."""
        self._archive_removed(incomplete)
        with self.path.open("r+b") as history:
            history.truncate(history.seek(-len(incomplete), os.SEEK_END))
            os.fsync(history.fileno())

    def forget_after(self, last: int, lines: list[dict[str, Any]]) -> None:
        """Cut off the lines after a round, and append them to ``history.removed.jsonl``."""
        self._archive_removed(_encoded(x for x in lines if x["round"] > last))
        with replacing(self.path) as file:
            file.write(_encoded(x for x in lines if x["round"] <= last))

    def _archive_removed(self, removed: bytes) -> None:
        with self.path.with_name("history.removed.jsonl").open("ab") as archive:
            archive.write(removed if removed.endswith(b"\n") else removed + b"\n")
            archive.flush()
            os.fsync(archive.fileno())
        sync_folder(self.path.parent)


def _encoded(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(f"{json_line(line)}\n" for line in lines).encode()


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the history as one object per round, in order, with all of a round's lines merged.

    Raises:
        UsageError: if the folder has no history, or one that cannot be read.
    """
    return merged(read_history_lines(folder))


def merged(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge the lines of a history as ``read_history`` does."""
    rounds: dict[int, dict[str, Any]] = {}
    ends: list[Mapping[str, Any]] = []  # with what was late or rejected since the last commit
    for line in lines:
        if line["event"] == "ended":
            ends.append(line)
            continue
        event, row = line["event"], rounds.setdefault(line["round"], {"round": line["round"]})
        row.update(
            (key, value)
            for key, value in line.items()
            if key != "event" and _OWNERS.get(key, event) == event
        )
        if event == "committed":  # the round that was open when the run was stopped
            while ends:
                row.update(add_uncounted(row, ends.pop(0)))
    for line in ends:
        row = rounds.setdefault(line["round"], {"round": line["round"]})
        row.update(add_uncounted(row, line))
    return [rounds[number] for number in sorted(rounds)]


def read_history_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the history, without one that is just being written.

    Raises:
        UsageError: if the folder has no history, or one that cannot be read.
    """
    path = folder / _NAME
    try:
        lines, _ = _read(path)
    except OSError as why:
        raise UsageError(f"{path} cannot be read ({why.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if lines:
        return lines
    newest = max(checkpoint_files(folder), default=0) if folder.is_dir() else 0
    if newest > 1:  # a crash leaves at most one checkpoint without a line
        raise UsageError(
            f"{folder} holds the checkpoint of round {newest}, but {_NAME} has no committed round; "
            f"restore {_NAME}"
        )
    if (folder / RUN_FILE).exists():
        raise UsageError(f"the run in {folder} has not committed any rounds yet")
    raise UsageError(f"there is no history in {folder}; give a run folder, such as runs/letters")


def _read(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Return what ``History.read`` does; ``ValueError`` names a damaged line before the last."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines, b""
    with open(path, "rb", opener=open_regular) as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            if not text.endswith(b"\n"):
                return lines, text
            try:
                line = _decoded(text)
            except ValueError:
                if not file.peek():  # a power failure may leave zeros within a complete last line
                    return lines, text
                raise ValueError(f"line {number} is damaged") from None
            try:
                check_line(line)
            except ValueError as wrong:
                raise ValueError(f"line {number} is damaged ({wrong})") from None
            lines.append(line)
    return lines, b""


def _decoded(text: bytes) -> Any:
    """Decode a line; ValueError if it is not JSON."""
    try:
        return json.loads(text, parse_float=_number, parse_constant=_number)
    except RecursionError as wrong:
        raise ValueError(str(wrong)) from None


def _number(text: str) -> float:
    """Return the number in a text; ValueError if it is not finite, which no coordinator writes."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number
