"""The entries of a journal, as they are both on a broker and in a file."""

from __future__ import annotations

import uuid

from fluffle_common.clock import timestamp
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.messages import EventRecord


class Entries:
    """Turns the events of one coordinator, whose ``session`` this is, into records."""

    def __init__(self) -> None:
        self.session = uuid.uuid4().hex[:12]
        self._run: str | None = None
        self._gists: dict[str, object] = {}  # of the latest report of each kind

    def record_of(self, event: RunEvent) -> EventRecord | None:
        """Return the record of an event that happens now; None if it is not to be journalled.

        Raises:
            ValueError: if the event does not fit into a record.
        """
        if isinstance(event, run_events.Started | run_events.Resumed) and event.run:
            self._run = event.run
        if isinstance(event, run_events.Opened | run_events.Committed):  # readers forget the wait
            self._gists.pop(run_events.Waiting.name, None)
        gist = event.gist()
        if not event.journalled or (gist is not None and gist == self._gists.get(event.name)):
            return None
        self._gists[event.name] = gist
        fields = event.fields()
        fields.pop("address", None)  # of the broker: its readers know it
        return EventRecord(event=event.name, time=timestamp(), run=self._run, fields=fields)
