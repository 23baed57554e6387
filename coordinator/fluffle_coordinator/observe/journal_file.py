"""The journal of a run in a file: of a simulation, whose broker ends with it.

Each line of ``journal.jsonl`` is an event as ``fluffle journal --json`` prints it. The file is no
record to recover from: it is not fsynced, and a crash may leave a torn last line, which readers
skip.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from fluffle_common.cli.console import json_line
from fluffle_common.durable_files import open_regular
from fluffle_common.errors import UsageError
from fluffle_common.protocol.events import Committed, RunEvent
from fluffle_common.protocol.messages import Event
from fluffle_coordinator.observe.journal_entries import Entries
from fluffle_coordinator.observe.watchers import Watcher

_NAME = "journal.jsonl"
_MOST_UNWRITTEN = 10_000


class JournalFile(Watcher):
    """A watcher that writes every event to the run's folder, a round at a time."""

    def __init__(self, folder: Path, federation: str) -> None:
        self._path, self._federation = folder / _NAME, federation
        self._entries, self._number = Entries(), 0
        self._unwritten: list[str] = []

    def record(self, event: RunEvent) -> None:
        """Keep an event; a commit writes what has been kept, which is lost if the disk refuses."""
        record = self._entries.record_of(event)
        if record is None:
            return
        self._number += 1
        ids = {
            "federation": self._federation,
            "session": self._entries.session,
            "number": self._number,
        }
        self._unwritten.append(json_line({**ids, **record.model_dump()}))
        if isinstance(event, Committed) or len(self._unwritten) >= _MOST_UNWRITTEN:
            self.write()

    def write(self) -> None:
        """Append to the file what it does not have yet."""
        lines, self._unwritten = self._unwritten, []
        # By its name each time: a fresh run moves the file of an earlier one aside.
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a torn line must not swallow the next one
                    file.write(b"\n")
            file.write("".join(f"{line}\n" for line in lines).encode())


def read_journal_file(folder: Path) -> Iterator[Event]:
    """Yield the events in the journal of a run's folder, without lines that are damaged.

    Raises:
        UsageError: if the folder has no journal, or none of its lines can be read.
    """
    path, readable, damaged = folder / _NAME, 0, 0
    try:
        file = open(path, encoding="utf-8", errors="replace", opener=open_regular)
    except OSError:
        raise UsageError(
            f"{folder} has no journal, because only a simulation keeps its journal in the run "
            "folder; to read the journal on the broker, use --federation NAME"
        ) from None
    with file:
        for line in file:
            try:
                event = Event(**json.loads(line))
            except (ValueError, TypeError, RecursionError):  # torn by a crash, or damaged
                damaged += 1
            else:
                readable += 1
                yield event
    if damaged and not readable:
        raise UsageError(f"{path} cannot be read (none of its lines is an event)")
