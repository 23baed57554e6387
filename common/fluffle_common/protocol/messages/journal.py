"""The messages in the journal: the events of a run."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict

from fluffle_common.protocol.messages.base import Header, Model
from fluffle_common.protocol.messages.fields import Id, limited

_MAX_FIELDS, _MAX_DEPTH = 1000, 20


def _check_depth(fields: dict[str, Any]) -> dict[str, Any]:
    """Limit the nesting of an event's fields, which whoever shows them follows recursively."""
    level: list[Any] = [fields]
    for _ in range(_MAX_DEPTH):
        items = (item for of in level for item in (of.values() if isinstance(of, dict) else of))
        level = [item for item in items if isinstance(item, dict | list | tuple)]
    if level:
        raise ValueError(f"the values are nested more than {_MAX_DEPTH} deep")
    return fields


class EventRecord(Model):
    """A run event by its name, with its time (ISO 8601, UTC) and its fields."""

    event: Annotated[str, Field(min_length=1, max_length=64)]
    time: Annotated[str, Field(max_length=40)]
    run: Id | None = None
    fields: Annotated[dict[str, Any], limited(_MAX_FIELDS), AfterValidator(_check_depth)] = Field(
        default_factory=dict
    )

    @property
    def moment(self) -> datetime | None:
        """The parsed ``time``; None if it is not ISO 8601 with a time zone."""
        try:
            parsed = datetime.fromisoformat(self.time)
        except ValueError:
            return None
        return parsed if parsed.tzinfo else None


class _Journalled(Header):
    """A message in the journal, identified by (``session``, ``number``).

    ``number`` counts the events of one coordinator process from 1, so that a reader can skip
    messages that were sent twice.
    """

    kind: str
    session: Id
    number: Annotated[int, Field(ge=1)]

    @property
    def identity(self) -> str:
        """The kind, ``session`` and ``number``."""
        return f"{self.kind}/{self.session}/{self.number}"


class Event(_Journalled, EventRecord):
    """One event."""

    kind: Literal["event"] = "event"


class Events(_Journalled):
    """A batch of events; the first has ``number``, and the others count up from there."""

    kind: Literal["events"] = "events"
    events: Annotated[
        tuple[EventRecord, ...],
        Strict(False),
        Field(min_length=1, max_length=1000, fail_fast=True),
    ]

    def each(self) -> list[Event]:
        """Return the events as separate messages."""
        return [
            Event(federation=self.federation, session=self.session, number=number, **dict(record))
            for number, record in enumerate(self.events, start=self.number)
        ]
