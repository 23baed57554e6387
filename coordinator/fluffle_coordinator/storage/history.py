"""The history of a run: ``history.jsonl``, one line a fact, on disk before anyone relies on it.

A crash may leave a torn last line, and nothing else: that line is cut off when the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluffle_common.cli.console import json_line
from fluffle_common.durable_files import replacing, sync_folder
from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.storage.round_stats import with_later

_NAME = "history.jsonl"


class History:
    """The history in the folder of a run, as its coordinator writes it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the history; it is on disk when this returns.

        Raises:
            OSError: where the disk refuses; nothing of the line is left in the file.
        """
        data = _written(line).encode()
        written = 0
        history = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            is_new = not os.fstat(history).st_size
            written = os.write(history, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(history)
            if is_new:
                sync_folder(self.path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(history, os.fstat(history).st_size - written)
            raise
        finally:
            os.close(history)

    def mend(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Read the history; a torn last line, left by a crash, is cut off.

        Where the power failed, blocks of it may be missing in the middle, or be zeros.

        Returns:
            The lines, and what was repaired.

        Raises:
            RunError: where it is damaged in the middle.
        """
        if not self.path.exists():
            return [], []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole == data:
            start = data[:-1].rfind(b"\n") + 1
            try:
                _parse(data[start:])
            except ValueError:
                whole = data[:start]
        try:
            lines = _parse(whole)
        except ValueError as why:
            raise RunError(f"{self.path}: {why}; repair it, or --fresh starts a new run") from None
        if whole == data:
            return lines, []
        self._put_aside(data[len(whole) :])
        with self.path.open("r+b") as history:
            history.truncate(len(whole))
            os.fsync(history.fileno())
        return lines, ["cut off a torn last line of history.jsonl"]

    def forget_after(self, last: int, lines: list[dict[str, Any]]) -> None:
        """Keep the history up to a round; what is cut off is kept beside it."""
        kept, cut = (
            "".join(map(_written, some))
            for some in (
                [line for line in lines if line["round"] <= last],
                [line for line in lines if line["round"] > last],
            )
        )
        self._put_aside(cut.encode())
        with replacing(self.path) as file:
            file.write(kept.encode())

    def _put_aside(self, cut: bytes) -> None:
        """Keep what is about to be cut off the history."""
        with self.path.with_name("history.removed.jsonl").open("ab") as removed:
            removed.write(cut if cut.endswith(b"\n") else cut + b"\n")
            removed.flush()
            os.fsync(removed.fileno())
        sync_folder(self.path.parent)


def _written(line: dict[str, Any]) -> str:
    text = json_line(line)
    if "NaN" in text or "Infinity" in text:  # which many readers of JSON do not know
        text = json_line(_without_nan(line))
    return f"{text}\n"


def _without_nan(value: Any) -> Any:
    """Put None, at any depth, where a number is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list | tuple) else value


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the history as one object a round, everything known about it merged, in order.

    Raises:
        UsageError: where the folder has no history, or one that cannot be read.
    """
    rounds: dict[int, dict[str, Any]] = {}
    for line in read_history_lines(folder):
        row = rounds.setdefault(line["round"], {})
        if line["event"] == "ended":
            row.update(with_later(row, line))
        else:
            row.update((key, value) for key, value in line.items() if key != "event")
    return [rounds[number] for number in sorted(rounds)]


def read_history_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the history as they were written; one that is being written is left out.

    Raises:
        UsageError: where the folder has no history, or one that cannot be read.
    """
    path = folder / _NAME
    if not path.exists():
        if (folder / "run.json").exists():
            raise UsageError(f"the run in {folder} has committed no round yet")
        raise UsageError(f"there is no history in {folder}; a run's folder is such as runs/NAME")
    data = path.read_bytes()
    try:
        return _parse(data[: data.rfind(b"\n") + 1])
    except ValueError as why:
        raise UsageError(f"{path}: {why}") from None


def _parse(data: bytes) -> list[dict[str, Any]]:
    """Parse the whole lines of a history.

    Raises:
        ValueError: naming the first line that is none.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            whole = isinstance(line["event"], str) and isinstance(line["round"], int)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"line {number} is damaged")
        lines.append(line)
    return lines
