"""Messages of the journal: what happened in a run."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from fluffle_common.protocol.messages.base import Header, Model
from fluffle_common.protocol.messages.fields import Id


class Happening(Model):
    """Something that happened; ``fields`` is what is known of it."""

    event: Annotated[str, Field(min_length=1, max_length=64)]
    time: Annotated[str, Field(max_length=40)]
    run: Id | None = None
    fields: dict[str, Any] = Field(default_factory=dict)

    @property
    def moment(self) -> datetime | None:
        """Return when it happened; None where ``time`` does not say so, with its zone."""
        try:
            at = datetime.fromisoformat(self.time)
        except ValueError:
            return None
        return at if at.tzinfo else None


class _Journalled(Header):
    """An entry of the journal.

    (``session``, ``number``) is its identity: ``number`` counts the events that one process of a
    coordinator tells, from 1, so that a reader can pass over what was sent twice.
    """

    kind: str
    session: Id
    number: Annotated[int, Field(ge=1)]

    @property
    def identity(self) -> str:
        """See above."""
        return f"{self.kind}/{self.session}/{self.number}"


class Event(_Journalled, Happening):
    """One event, as the journal keeps it."""

    kind: Literal["event"] = "event"


class Events(_Journalled):
    """Many events that were told at once; the first has ``number``, the others follow."""

    kind: Literal["events"] = "events"
    events: Annotated[tuple[Happening, ...], Strict(False), Field(min_length=1, max_length=1000)]

    def each(self) -> list[Event]:
        """Return them one by one."""
        ids: dict[str, Any] = {"federation": self.federation, "session": self.session}
        return [
            Event(
                **ids, number=number, event=one.event, time=one.time, run=one.run, fields=one.fields
            )
            for number, one in enumerate(self.events, start=self.number)
        ]
