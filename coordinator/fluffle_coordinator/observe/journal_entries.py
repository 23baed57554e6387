"""The entries of a journal, as they are both on a broker and in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fluffle_common.clock import timestamp
from fluffle_common.protocol.events import Resumed, RunEvent, Standby, Started, Waiting

_OMITTED_FIELD = "address"  # of the broker: its readers know it
_NOTHING = object()


class Entry(NamedTuple):
    """An event as the journal keeps it, yet to be numbered."""

    name: str
    time: str
    run: str | None
    fields: Mapping[str, Any]


class Entries:
    """Turns the events of a coordinator into entries.

    Args:
        now: returns the time in UTC as ISO 8601.
    """

    def __init__(self, now: Callable[[], str] = timestamp) -> None:
        self._now = now
        self._run: str | None = None
        self._latest_gist: dict[str, object] = {}

    def entry_of(self, event: RunEvent) -> Entry | None:
        """Return the entry of an event; None for one that is not journalled, or a repetition."""
        if isinstance(event, Started | Resumed) and event.run:
            self._run = event.run
        if not event.journalled or self._is_repetition(event):
            return None
        fields = event.fields()
        fields.pop(_OMITTED_FIELD, None)
        return Entry(event.name, self._now(), self._run, fields)

    def _is_repetition(self, event: RunEvent) -> bool:
        """Whether a periodic report has the same gist as the last one."""
        if not isinstance(event, Waiting | Standby):
            return False
        gist = event.gist()
        before, self._latest_gist[event.name] = self._latest_gist.get(event.name, _NOTHING), gist
        return gist == before
