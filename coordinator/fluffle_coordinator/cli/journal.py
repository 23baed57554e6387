"""``fluffle journal`` and ``fluffle explain``: what happened in a federation, and why."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import count
from fluffle_common.cli.console import finite, warn
from fluffle_common.cli.printing import echo, echo_json, echo_sentences
from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.journal_source import (
    broker_of,
    end_of,
    events_of,
    events_on_broker,
    source_options,
)

if TYPE_CHECKING:
    from fluffle_common.protocol.messages import Event
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.base import Transport
    from fluffle_coordinator.observe.explain import Entry


_run_id_option = click.option("--run-id", metavar="ID", help="Show only the run with this ID.")


def _known_kinds(_: click.Context, __: click.Parameter, kinds: tuple[str, ...]) -> tuple[str, ...]:
    from fluffle_common.arguments import nearest
    from fluffle_common.protocol.events import REGISTRY

    known = [name for name, event in REGISTRY.items() if event.journalled]
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"unknown --kind {kind}; {nearest(kind, known)}")
    return kinds


@click.command()
@source_options
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
    help="Show only events of this kind, such as counted, late or rejected. For several kinds, "
    "repeat the option.",
)
@_run_id_option
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Also print new events as they happen, until you press Ctrl-C.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def journal(**options: Any) -> None:
    """Print what happened in a federation, one event per line.

    The coordinator keeps its journal on the broker. Any user with permission can read the journal
    from any machine, and reading removes nothing. Times are in local time. A heading marks each
    new day and each new run.

    \b
      fluffle journal --federation letters --since 10m
      fluffle journal --federation letters --round 7
      fluffle journal --federation letters --kind rejected --kind late
      fluffle journal --federation letters --follow
      fluffle journal --run runs/simulation
    """
    from fluffle_common.cli.runtime import run_until_signalled

    show = _print_json if options["as_json"] else _SentencePrinter()
    runs: dict[str, None] = {}
    rounds: set[int] = set()
    workers: set[str] = set()

    async def run() -> None:
        async with contextlib.aclosing(events_of(options)) as events:
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

    run_until_signalled(run())
    for absent in _not_found(options, list(runs), rounds, workers):
        if options["since"] is None:
            raise UsageError(absent)
        warn(absent)  # not an error: nothing may have happened since then


def _not_found(
    options: Mapping[str, Any], runs: Sequence[str], rounds: set[int], workers: set[str]
) -> Iterator[str]:
    """Yield a sentence about each selection that no event in the journal matches."""
    from fluffle_common.arguments import nearest

    what = "the journal" if options["since"] is None else "the journal after --since"
    number, known = options["number"], {"run": runs, "worker": workers}
    if number is not None and number not in rounds:
        have = f"rounds {_spans(rounds)}" if rounds else "no round"
        yield f"round {number} is not in {what}, which has {have}"
    for kind, name in (("run", options["run_id"]), ("worker", options["worker"])):
        if name not in (None, *known[kind]):
            have = f"; {nearest(name, known[kind])}" if known[kind] else f", which has no {kind}"
            yield f"{kind} {name} is not in {what}{have}"


@click.command()
@source_options
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
        entries, coordinated = asyncio.run(_read(*broker_of(federation, url)))
        now = datetime.now(UTC)  # not earlier, because reading takes a while
    else:
        entries, coordinated = list(map(Entry.of, read_journal_file(folder))), None
        now = end_of(entries)
    run, number = _choose_round(entries, run_id, number)
    explanation = explain_round(entries, run, number, now, coordinated=coordinated)
    if as_json:
        echo_json(as_dict(explanation))
    else:
        echo_sentences(*sentences(explanation))


def _choose_round(entries: list[Entry], run: str | None, number: int | None) -> tuple[str, int]:
    """Return the run and round to explain, the newest by default; round 0 if there is none yet."""
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

    async with contextlib.aclosing(events_on_broker(transport, topology)) as events:
        journal = [Entry.of(event) async for event in events]
    with contextlib.suppress(BrokerError):
        async with open_once(transport) as link:
            counts = await link.counts(topology.presence)
        return journal, counts is not None and counts.consumers > 0
    return journal, None


def _workers_of(event: Event) -> set[str]:
    """Return the workers that an event is about."""
    fields = event.fields
    lists = [fields.get(key) for key in ("asked", "participants", "workers", "missing")]
    named = [one for many in lists if isinstance(many, list) for one in many]
    names = [one.get("worker") if isinstance(one, Mapping) else one for one in [fields, *named]]
    return {name for name in names if isinstance(name, str)}


def _print_json(event: Event) -> None:
    echo_json(finite(event.model_dump(exclude={"protocol", "kind", "pad"})), indent=None)


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
