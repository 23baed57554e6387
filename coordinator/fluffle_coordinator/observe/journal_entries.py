"""The entries of a journal, as they are both on a broker and in a file."""

from __future__ import annotations

import uuid

from fluffle_common.clock import timestamp
from fluffle_common.protocol.events import (
    Committed,
    Opened,
    Resumed,
    RunEvent,
    Standby,
    Started,
    Waiting,
)
from fluffle_common.protocol.messages import EventRecord

_OMITTED_FIELD = "address"  # of the broker: its readers know it


class Entries:
    """Turns the events of one coordinator, whose ``session`` this is, into records."""

    def __init__(self) -> None:
        self.session = uuid.uuid4().hex[:12]
        self._run: str | None = None
        self._gists: dict[str, object] = {}  # of the latest report of each kind

    def record_of(self, event: RunEvent) -> EventRecord | None:
        """Return the record of an event that happens now.

        It is None for an event that is not journalled, or a repetition.

        Raises:
            ValueError: if the event does not fit into a record.
        """
        if isinstance(event, Started | Resumed) and event.run:
            self._run = event.run
        if isinstance(event, Opened | Committed):  # readers forget what the run waited for
            self._gists.pop(Waiting.name, None)
        if not event.journalled or self._is_repetition(event):
            return None
        fields = event.fields()
        fields.pop(_OMITTED_FIELD, None)
        return EventRecord(event=event.name, time=timestamp(), run=self._run, fields=fields)

    def _is_repetition(self, event: RunEvent) -> bool:
        """Whether a periodic report has the same gist as the last one."""
        if not isinstance(event, Waiting | Standby):
            return False
        latest = self._gists.get(event.name)
        self._gists[event.name] = event.gist()
        return latest == self._gists[event.name]
