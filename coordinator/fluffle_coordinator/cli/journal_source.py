"""Where ``journal`` and ``explain`` read from: a broker, or the run folder of a simulation."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import optional_federation, url_option
from fluffle_common.cli.console import warn
from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.option_group import option_group

if TYPE_CHECKING:
    from fluffle_common.protocol.messages import Event
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.base import Transport
    from fluffle_coordinator.observe.explain import Entry

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_GIVE_UP_S = 5.0
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def moment(text: str, now: datetime) -> datetime:
    """Return the time that ``text`` means: an age such as ``10m``, or ISO 8601 (local by default).

    >>> now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    >>> moment("10m", now).isoformat()
    '2026-03-01T11:50:00+00:00'
    >>> moment("2026-03-01T12:00+01:00", now).astimezone(UTC).isoformat()
    '2026-03-01T11:00:00+00:00'

    Raises:
        BadParameter: if it is neither.
    """
    ago = _AGO.fullmatch(text)
    try:
        if ago is None:
            return datetime.fromisoformat(text).astimezone()
        return now - timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"invalid time '{text}'; write 90s, 10m, 2h, 3d or 2026-03-01T12:00",
            param_hint="'--since'",
        ) from None


source_options = option_group(
    optional_federation,
    url_option,
    click.option(
        "--run",
        "folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Run folder of a simulation. The journal is read from this folder instead of from a "
        "broker.",
    ),
)


def events_of(options: Mapping[str, Any]) -> AsyncGenerator[Event]:
    """Return the events of the journal that the options select."""
    folder, since, follow = options["folder"], options["since"], options["follow"]
    if folder is None:
        start = None if since is None else moment(since, datetime.now(UTC))
        broker = broker_of(options["federation"], options["url"])
        return events_on_broker(*broker, start, live=follow)
    if follow:
        raise UsageError(
            "--follow conflicts with --run, because only a journal on a broker can be followed; "
            "remove --follow"
        )
    return _events_in_file(folder, since)


def broker_of(federation: str | None, url: str | None) -> tuple[Transport, Topology]:
    """Return where the journal of a federation is.

    Raises:
        UsageError: if none is named, which is required unless the journal is in a run folder.
    """
    from fluffle_common.cli.settings import broker_url_finder, check_federation
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport

    if federation is None:
        raise UsageError(
            "no federation is given; use --federation NAME or set FLUFFLE_FEDERATION. For the "
            "journal of a simulation, use --run DIR"
        )
    topology = Topology(check_federation(federation))
    return AmqpTransport(broker_url_finder(url), f"fluffle journal of {federation}"), topology


def events_on_broker(
    transport: Transport, topology: Topology, since: datetime | None = None, *, live: bool = False
) -> AsyncGenerator[Event]:
    """Return the events of the journal on a broker."""
    from fluffle_common.transport.reconnect import Backoff
    from fluffle_coordinator.observe.journal_reader import read_journal

    def waiting(why: str) -> None:
        limit = "" if live else f" for {_GIVE_UP_S:.0f} s"
        warn(f"cannot read the journal now ({why}); trying again{limit}")

    backoff = Backoff() if live else Backoff(give_up_s=_GIVE_UP_S)
    return read_journal(
        transport, topology, since=since, live=live, waiting=waiting, backoff=backoff
    )


async def _events_in_file(folder: Path, since: str | None) -> AsyncGenerator[Event]:
    from fluffle_coordinator.observe.journal_file import read_journal_file

    start = None
    if since is not None:
        start = moment(since, end_of(deque(read_journal_file(folder), maxlen=1)))
    for event in read_journal_file(folder):
        if start is None or (event.moment or start) >= start:
            yield event


def end_of(journal: Sequence[Event | Entry]) -> datetime:
    """Return when a simulation ended, in its own time, which may be ahead of the clock."""
    return (journal[-1].moment if journal else None) or datetime.now(UTC)
