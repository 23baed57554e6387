"""``fluffle journal`` and ``fluffle explain``: what happened in a federation, and why."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import count, optional_federation, url_option
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo, echo_json, echo_sentences
from fluffle_common.errors import UsageError

if TYPE_CHECKING:
    from fluffle_common.protocol.messages import Event
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.base import Transport
    from fluffle_coordinator.observe.explain import Entry

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_GIVE_UP_S = 5.0
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")

_run_id_option = click.option("--run-id", metavar="ID", help="Show only the run with this ID.")


def moment(text: str, now: datetime) -> datetime:
    """Return the time that ``text`` means: an age such as ``10m``, or ISO 8601 (local by default).

    >>> now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    >>> moment("10m", now).isoformat()
    '2026-03-01T11:50:00+00:00'
    >>> moment("2026-03-01T12:00+01:00", now).astimezone(UTC).isoformat()
    '2026-03-01T11:00:00+00:00'

    Raises:
        ValueError, OverflowError: if it is neither.
    """
    ago = _AGO.fullmatch(text)
    if ago is None:
        return datetime.fromisoformat(text).astimezone()
    return now - timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])


def _source_options(command: Any) -> Any:
    """Add the options for the source of the journal: a broker, or a simulation's run folder."""
    run_option = click.option(
        "--run",
        "folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Run folder of a simulation. The journal is read from this folder instead of from a "
        "broker.",
    )
    return optional_federation(url_option(run_option(command)))


def _since(text: str | None, now: datetime) -> datetime | None:
    try:
        return None if text is None else moment(text, now)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"invalid time '{text}'; write 90s, 10m, 2h, 3d or 2026-03-01T12:00",
            param_hint="'--since'",
        ) from None


def _known_kinds(_: click.Context, __: click.Parameter, kinds: tuple[str, ...]) -> tuple[str, ...]:
    from fluffle_common.arguments import nearest
    from fluffle_common.protocol.events import REGISTRY

    known = [name for name, event in REGISTRY.items() if event.journalled]
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"unknown --kind {kind}; {nearest(kind, known)}")
    return kinds


@click.command()
@_source_options
@click.option(
    "--since",
    metavar="WHEN",
    help="Show only events since this time: an age such as 90s, 10m, 2h or 3d, or a date and time "
    "such as 2026-03-01T12:00.",
)
@click.option(
    "--round", "number", type=count(0), metavar="N", help="Show only events of this round."
)
@click.option("--worker", metavar="ID", help="Show only events about this worker.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    callback=_known_kinds,
    metavar="EVENT",
    help="Show only events of this kind, such as counted, late or rejected; may be given several "
    "times.",
)
@_run_id_option
@click.option("--follow", "-f", is_flag=True, help="Continue with new events as they happen.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def journal(**options: Any) -> None:
    """Print what happened in a federation, one event per line.

    The coordinator keeps its journal on the broker. Any user with permission can read the journal
    from any machine, and reading removes nothing. Times are in local time. A heading marks each
    change of the day or the run.

    \b
      fluffle journal --federation letters --since 10m
      fluffle journal --federation letters --round 7
      fluffle journal --federation letters --kind rejected --kind late
      fluffle journal --federation letters --follow
      fluffle journal --run runs/simulation
    """
    show = _print_json if options["as_json"] else _SentencePrinter()
    runs: dict[str, None] = {}
    rounds: set[int] = set()
    workers: set[str] = set()

    async def run() -> None:
        async with contextlib.aclosing(_events_of(options)) as events:
            async for event in events:
                if event.run is not None:
                    runs[event.run] = None
                if options["run_id"] not in (None, event.run):
                    continue
                if isinstance(event.fields.get("round"), int):
                    rounds.add(event.fields["round"])
                concerned = _workers_of(event)
                workers.update(concerned)
                if (
                    options["number"] in (None, event.fields.get("round"))
                    and options["worker"] in (None, *concerned)
                    and (not options["kinds"] or event.event in options["kinds"])
                ):
                    show(event)

    asyncio.run(run())
    _check_found(options, list(runs), rounds, workers)


def _check_found(
    options: Mapping[str, Any], runs: Sequence[str], rounds: set[int], workers: set[str]
) -> None:
    """Raise ``UsageError`` if the journal lacks what the options select."""
    from fluffle_common.arguments import nearest

    what = "the journal" if options["since"] is None else "the journal after --since"
    if options["run_id"] not in (None, *runs):
        have = f"; choose from {', '.join(runs)}" if runs else ", which has no run"
        raise UsageError(f"run {options['run_id']} is not in {what}{have}")
    number = options["number"]
    if number is not None and number not in rounds:
        have = f"rounds {_spans(rounds)}" if rounds else "no round"
        raise UsageError(f"round {number} is not in {what}, which has {have}")
    worker = options["worker"]
    if worker not in (None, *workers):
        have = f"; {nearest(worker, workers)}" if workers else ", which has no worker"
        raise UsageError(f"worker {worker} is not in {what}{have}")


def _events_of(options: Mapping[str, Any]) -> AsyncGenerator[Event]:
    """Return the events of the journal that the options select."""
    folder, since, follow = options["folder"], options["since"], options["follow"]
    if folder is None:
        start = _since(since, datetime.now(UTC))
        where = _where(options["federation"], options["url"])
        return _follow(*where, start) if follow else _events(*where, start)
    if follow:
        raise UsageError(
            "--follow conflicts with --run, because only a journal on a broker can be followed; "
            "remove --follow"
        )
    return _events_in_file(folder, since)


async def _follow(
    transport: Transport, topology: Topology, since: datetime | None
) -> AsyncGenerator[Event]:
    """Yield the events of a journal for ever; say so if it does not exist yet."""
    from fluffle_common.errors import BrokerError
    from fluffle_common.transport.open_once import open_once

    federation = topology.federation
    with contextlib.suppress(BrokerError):  # which reading reports, and waits
        async with open_once(transport) as link:
            if await link.counts(topology.journal) is None:
                warn(
                    f"federation {federation} has no journal on this broker yet; waiting. If the "
                    f"name is wrong, 'fluffle queues --federation {federation}' lists the right "
                    "ones"
                )
    async with contextlib.aclosing(_events(transport, topology, since, live=True)) as events:
        async for event in events:
            yield event


async def _events_in_file(folder: Path, since: str | None) -> AsyncGenerator[Event]:
    from fluffle_coordinator.observe.journal_file import read_journal_file

    start = None
    if since is not None:
        start = _since(since, _end_of(deque(read_journal_file(folder), maxlen=1)))
    for event in read_journal_file(folder):
        if start is None or (event.moment or start) >= start:
            yield event


def _end_of(journal: Sequence[Event | Entry]) -> datetime:
    """Return when a simulation ended, in its own time, which may be ahead of the clock."""
    return (journal[-1].moment if journal else None) or datetime.now(UTC)


@click.command()
@_source_options
@click.argument("number", metavar="[ROUND]", type=count(), required=False)
@_run_id_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain(
    *,
    federation: str | None,
    url: str | None,
    folder: Path | None,
    number: int | None,
    run_id: str | None,
    as_json: bool,
) -> None:
    """Explain what happened in a round, or what it is waiting for.

    The command reads the journal, so you can explain a round while it is open or long afterwards.
    The explanation shows which workers were asked, which answered, and why others are missing. It
    also shows late and rejected updates, the time left, and the longest wait. Without ROUND, the
    command explains the newest round of the newest run.

    \b
      fluffle explain --federation letters            what is the run waiting for?
      fluffle explain --federation letters 7
      fluffle explain --run runs/simulation 7
    """
    from fluffle_coordinator.observe.explain import Entry
    from fluffle_coordinator.observe.explain import explain as explain_round
    from fluffle_coordinator.observe.explain_sentences import as_dict, sentences
    from fluffle_coordinator.observe.journal_file import read_journal_file

    if folder is None:
        entries, coordinated = asyncio.run(_read(*_where(federation, url)))
        now = datetime.now(UTC)  # not earlier, because reading takes a while
    else:
        entries, coordinated = list(map(Entry.of, read_journal_file(folder))), None
        now = _end_of(entries)
    run, number = _choose_round(entries, run_id, number)
    explanation = explain_round(entries, run, number, now, coordinated=coordinated)
    if as_json:
        echo_json(as_dict(explanation))
    else:
        echo_sentences(*sentences(explanation))


def _choose_round(entries: list[Entry], run: str | None, number: int | None) -> tuple[str, int]:
    """Return the run and round to explain, the newest by default; round 0 if there is none yet.

    Raises:
        UsageError: if the journal does not have them; the message lists those that it has.
    """
    from fluffle_coordinator.observe.explain import runs_of

    runs = runs_of(entries)
    if not runs:
        raise UsageError("the journal has no run yet")
    if run is not None and run not in runs:
        raise UsageError(f"run {run} is not in the journal; choose from {', '.join(runs)}")
    run = run or list(runs)[-1]
    rounds = runs[run]
    if not rounds and number is None:
        return run, 0
    if not rounds:
        raise UsageError(
            f"run {run} has not opened a round yet; 'fluffle explain' without a round shows what "
            "the run is waiting for"
        )
    if number is not None and number not in rounds:
        others = ", ".join(
            f"rounds {_spans(have)} of run {other}" for other, have in runs.items() if have
        )
        raise UsageError(
            f"round {number} of run {run} is not in the journal; the journal has {others}"
        )
    return run, rounds[-1] if number is None else number


def _spans(numbers: Iterable[int]) -> str:
    """Abbreviate numbers as ranges.

    >>> _spans([4, 1, 2, 3, 7])
    '1-4, 7'
    """
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


async def _read(transport: Transport, topology: Topology) -> tuple[list[Entry], bool | None]:
    """Return the journal, and whether a coordinator is connected: None when that is unknown."""
    from fluffle_common.errors import BrokerError
    from fluffle_common.transport.open_once import open_once
    from fluffle_coordinator.observe.explain import Entry

    async with contextlib.aclosing(_events(transport, topology)) as events:
        journal = [Entry.of(event) async for event in events]
    with contextlib.suppress(BrokerError):
        async with open_once(transport) as link:
            counts = await link.counts(topology.presence)
        return journal, counts is not None and counts.consumers > 0
    return journal, None


def _where(federation: str | None, url: str | None) -> tuple[Transport, Topology]:
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


def _events(
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


def _workers_of(event: Event) -> set[str]:
    """Return the workers that an event is about."""
    fields = event.fields
    lists = [fields.get(key) for key in ("asked", "participants", "workers", "missing")]
    named = [one for many in lists if isinstance(many, list) for one in many]
    names = [one.get("worker") if isinstance(one, Mapping) else one for one in [fields, *named]]
    return {name for name in names if isinstance(name, str)}


def _print_json(event: Event) -> None:
    echo_json(event.model_dump(exclude={"protocol", "kind", "pad"}), indent=None)


class _SentencePrinter:
    """Prints events as sentences, under a heading whenever the day or the run changes."""

    def __init__(self) -> None:
        self._heading = ""

    def __call__(self, event: Event) -> None:
        from fluffle_common.protocol.events import from_fields

        at = event.moment
        day, clock = at.astimezone().strftime("%Y-%m-%d %H:%M:%S").split() if at else ("?", "?")
        heading = f"{day}, run {event.run}" if event.run else day
        if heading != self._heading:
            echo(f"--- {heading}")
            self._heading = heading
        echo_sentences(f"{clock}  {from_fields(event.event, event.fields).sentence()}")
