"""The journal: which events are published and read, in which order, whatever the broker does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import BrokerError, LinkLost, UsageError
from fluffle_common.protocol.events import (
    REGISTRY,
    Committed,
    Disconnected,
    Doing,
    NoBroker,
    Opened,
    Standby,
    Waiting,
    from_fields,
)
from fluffle_common.protocol.messages import Event, Events
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode, encode
from fluffle_common.transport.base import AccessRefused, Link, Properties, QueueFull, Unroutable
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.reconnect import Backoff
from fluffle_coordinator.cli.journal import journal
from fluffle_coordinator.observe.journal_entries import Entries
from fluffle_coordinator.observe.journal_file import JournalFile, read_journal_file
from fluffle_coordinator.observe.journal_reader import read_journal
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.watchers import Watchers

TOPOLOGY = Topology("f")
PATIENCE_S = 60.0


class Faulty:
    """A link whose publishes have the given outcomes, one each; later ones succeed."""

    def __init__(self, link: Link, outcomes: Sequence[Exception | None]) -> None:
        self._link, self._outcomes = link, list(outcomes)
        self.in_flight = self.most_in_flight = 0

    async def publish(
        self, body: bytes, properties: Properties, *, exchange: str, keys: Sequence[str]
    ) -> None:
        outcome = self._outcomes.pop(0) if self._outcomes else None
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        try:
            # With a lost link, the message may have reached the broker all the same.
            if not isinstance(outcome, QueueFull | Unroutable):
                await self._link.publish(body, properties, exchange=exchange, keys=keys)
            await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        if outcome is not None:
            raise outcome


@pytest.fixture
async def broker() -> MemoryBroker:
    made = MemoryBroker()
    link = await made.open()
    await link.declare(TOPOLOGY.shared())
    await link.close()
    return made


@contextlib.asynccontextmanager
async def published(journal: Journal, link: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Publish the journal's events until the end of the block."""
    task = asyncio.create_task(journal.publish(link))
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def drained(journal: Journal) -> None:
    await journal.drained(PATIENCE_S)


def raw(broker: MemoryBroker) -> list[Event]:
    """Return all events in the stream, including duplicates."""
    events: list[Event] = []
    for stored in broker.queues[TOPOLOGY.journal].ready:
        message, _ = decode(stored.body, "f")
        assert isinstance(message, Event | Events)
        events += message.each() if isinstance(message, Events) else [message]
    return events


async def read(broker: MemoryBroker, **how: Any) -> list[Event]:
    async with (
        asyncio.timeout(PATIENCE_S),
        contextlib.aclosing(read_journal(broker, TOPOLOGY, **how)) as events,
    ):
        return [event async for event in events]


def names(events: Sequence[Event]) -> list[str]:
    return [event.event for event in events]


# --- publishing --------------------------------------------------------------------------------


async def test_events_before_the_first_link_are_published_first(broker):
    journal = Journal(TOPOLOGY)
    journal.record(from_fields("started", {"run": "r1", "folder": "runs/f"}))
    async with published(journal, await broker.open()):
        journal.record(from_fields("connected", {"address": "amqp://host/"}))
        journal.record(from_fields("opened", {"round": 1, "asked": ["a", "b"], "needed": 2}))
        await drained(journal)
    started, connected, opened = await read(broker)
    assert names([started, connected, opened]) == ["started", "connected", "opened"]
    assert [event.number for event in (started, connected, opened)] == [1, 2, 3]
    assert {event.session for event in (started, connected, opened)} == {started.session}
    assert {event.run for event in (started, connected, opened)} == {"r1"}
    assert started.moment is not None
    assert connected.fields == {}  # readers know the broker's address
    assert opened.fields == {"round": 1, "asked": ["a", "b"], "needed": 2}


async def test_an_event_is_readable_in_the_management_ui(broker):
    journal = Journal(TOPOLOGY)
    async with published(journal, await broker.open()):
        journal.record(from_fields("counted", {"round": 3, "worker": "a", "num_examples": 5}))
        await drained(journal)
    (stored,) = broker.queues[TOPOLOGY.journal].ready
    (event,) = raw(broker)
    assert stored.properties.type == "event"
    assert stored.properties.message_id == f"event/{event.session}/1"
    assert dict(stored.properties.headers) == {"event": "counted", "round": 3, "worker": "a"}
    assert stored.properties.durable


async def test_a_path_that_is_not_utf_8_does_not_end_the_journal(broker):
    journal = Journal(TOPOLOGY)
    journal.record(from_fields("started", {"folder": "runs/\udcff"}))
    async with published(journal, await broker.open()):
        await drained(journal)
    assert [event.fields for event in await read(broker)] == [{"folder": r"runs/\udcff"}]


async def test_many_events_at_once_are_one_message(broker):
    journal = Journal(TOPOLOGY)
    for number in range(1, 21):
        journal.record(from_fields("opened", {"round": number}))
    async with published(journal, await broker.open()):
        await drained(journal)
    (stored,) = broker.queues[TOPOLOGY.journal].ready
    events = await read(broker)
    assert stored.properties.type == "events"
    assert stored.properties.message_id == f"events/{events[0].session}/1"
    assert dict(stored.properties.headers) == {"events": 20}
    assert [event.number for event in events] == list(range(1, 21))
    assert events[6].fields == {"round": 7}


async def test_a_refused_batch_is_counted_in_the_gap(broker):
    journal = Journal(TOPOLOGY)
    for number in range(1, 13):
        journal.record(from_fields("opened", {"round": number}))
    async with published(journal, Faulty(await broker.open(), [QueueFull("x")])):
        await drained(journal)
        journal.record(from_fields("opened", {"round": 13}))
        await drained(journal)
    gap, last = await read(broker)
    assert (gap.event, gap.fields) == ("gap", {"dropped": 12})
    assert (last.number, last.fields) == (14, {"round": 13})


async def test_two_processes_have_two_sessions(broker):
    for _ in range(2):
        journal = Journal(TOPOLOGY)
        async with published(journal, await broker.open()):
            journal.record(from_fields("started", {"run": "r"}))
            await drained(journal)
    one, two = await read(broker)
    assert one.session != two.session
    assert one.number == two.number == 1


async def test_unconfirmed_events_are_published_again_with_the_same_identity(broker):
    journal = Journal(TOPOLOGY)
    for number in range(1, 6):
        journal.record(from_fields("opened", {"round": number}))
    first = Faulty(await broker.open(), [None, None, LinkLost("x"), LinkLost("x")])
    with pytest.raises(LinkLost):
        await journal.publish(first)  # type: ignore[arg-type]
    assert first.most_in_flight > 1  # not one at a time
    async with published(journal, await broker.open()):
        journal.record(from_fields("opened", {"round": 6}))
        await drained(journal)
    assert len(raw(broker)) > 6
    events = await read(broker)
    assert [event.fields["round"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.number for event in events] == [1, 2, 3, 4, 5, 6]


async def test_an_event_that_is_published_again_is_not_counted_as_dropped(broker):
    journal = Journal(TOPOLOGY)
    for number in range(1, 4):
        journal.record(from_fields("opened", {"round": number}))
    with pytest.raises(LinkLost):
        await journal.publish(Faulty(await broker.open(), [QueueFull("x"), LinkLost("x")]))  # type: ignore[arg-type]
    async with published(journal, await broker.open()):
        await drained(journal)
        journal.record(from_fields("opened", {"round": 4}))
        await drained(journal)
    assert set(names(raw(broker))) == {"opened"}


async def test_cancelling_loses_no_unconfirmed_event(broker):
    journal = Journal(TOPOLOGY)
    begun, never = asyncio.Event(), asyncio.Event()

    class Held(Faulty):
        async def publish(self, *args: Any, **kwargs: Any) -> None:
            begun.set()
            await never.wait()

    async with published(journal, Held(await broker.open(), [])):
        journal.record(from_fields("opened", {"round": 1}))
        journal.record(from_fields("opened", {"round": 2}))
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
    assert raw(broker) == []
    async with published(journal, await broker.open()):
        await drained(journal)
    assert [event.fields["round"] for event in raw(broker)] == [1, 2]


async def test_beyond_its_capacity_it_drops_and_counts_the_oldest(broker):
    journal = Journal(TOPOLOGY, capacity=3)
    for number in range(1, 8):
        journal.record(from_fields("opened", {"round": number}))
    async with published(journal, await broker.open()):
        await drained(journal)
        journal.record(from_fields("opened", {"round": 8}))
        await drained(journal)
    events = await read(broker)
    assert names(events) == ["gap", *["opened"] * 4]
    assert events[0].fields == {"dropped": 4}
    assert [event.fields["round"] for event in events[1:]] == [5, 6, 7, 8]
    assert [event.number for event in events] == [1, 2, 3, 4, 5]
    assert from_fields("gap", events[0].fields).sentence().startswith("4 earlier events")


@pytest.mark.parametrize("wrong", [QueueFull("no room"), Unroutable("no stream")])
async def test_a_stream_that_confirms_nothing_stops_nothing(broker, wrong):
    journal = Journal(TOPOLOGY)
    async with published(journal, Faulty(await broker.open(), [wrong] * 3)) as task:
        for number in range(1, 4):
            journal.record(from_fields("opened", {"round": number}))
        await drained(journal)
        assert raw(broker) == []
        journal.record(from_fields("opened", {"round": 4}))
        await drained(journal)
        assert not task.done()
    gap, opened = await read(broker)
    assert (gap.event, gap.fields) == ("gap", {"dropped": 3})
    assert opened.fields == {"round": 4}


async def test_draining_waits_only_while_there_is_a_link(broker):
    journal = Journal(TOPOLOGY)
    journal.record(from_fields("finished", {"reason": "2 rounds are done"}))
    await drained(journal)  # without a link, it returns at once
    assert raw(broker) == []
    never = asyncio.Event()

    class Stuck(Faulty):
        async def publish(self, *args: Any, **kwargs: Any) -> None:
            await never.wait()

    async with published(journal, Stuck(await broker.open(), [])):
        await journal.drained(0.01)  # the broker does not confirm, so it gives up
    async with published(journal, await broker.open()):
        await drained(journal)
    assert names(raw(broker)) == ["finished"]


async def test_periodic_reports_are_published_only_on_a_change(broker):
    journal = Journal(TOPOLOGY)

    def training(step: int) -> Doing:
        return Doing("w1", "training", step, 10)

    def waiting(left_s: int, doing: Doing) -> Waiting:
        reason = f"round 1: 1 of 2 updates, {left_s} s to the deadline; {doing.worker} ..."
        return Waiting(reason=reason, what="updates", round=1, missing=(doing,), short=0)

    happened = [
        NoBroker(reason="refused"),
        waiting(590, training(3)),
        waiting(580, training(9)),
        waiting(570, Doing("w1", "gone")),
        waiting(560, Doing("w2", "gone")),
        Waiting(reason="waiting for the evaluation by w1", what="evaluations"),
        Waiting(reason="waiting for the evaluation by w1", what="evaluations"),
        Standby(what="runs/f"),
        Standby(what="runs/f"),
    ]
    async with published(journal, await broker.open()):
        for event in happened:
            journal.record(event)
        await drained(journal)
    events = await read(broker)
    assert names(events) == ["waiting", "waiting", "waiting", "waiting", "standby"]
    assert [event.fields.get("missing") for event in events[:4]] == [
        [{"worker": "w1", "state": "training", "step": 3, "steps": 10}],
        [{"worker": "w1", "state": "gone"}],
        [{"worker": "w2", "state": "gone"}],
        None,
    ]


@given(
    st.lists(st.sampled_from(["tell", "tell", "link", "cut", "run"]), max_size=40),
    st.integers(1, 6),
)
def test_each_event_is_read_once_and_in_order_or_counted_as_dropped(steps, capacity):
    async def play() -> None:
        broker = MemoryBroker()
        link: MemoryLink | None = None
        await (await broker.open()).declare(TOPOLOGY.shared())
        journal = Journal(TOPOLOGY, capacity=capacity)
        task: asyncio.Task[None] | None = None
        recorded = 0
        for step in [*steps, "link", "tell"]:
            if step == "tell":
                recorded += 1
                journal.record(from_fields("opened", {"round": recorded}))
            elif step == "cut" and link is not None and task is not None:
                link.cut()
                task.cancel()  # like another user of the link that ends
                await asyncio.gather(task, return_exceptions=True)
                link = task = None
            elif step == "link" and task is None:
                link = await broker.open()
                task = asyncio.create_task(journal.publish(link))
            elif step == "run":
                for _ in range(3):
                    await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        await drained(journal)
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        events = await read(broker)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        rounds = [event.fields["round"] for event in events if event.event == "opened"]
        assert rounds == sorted(set(rounds))
        dropped = sum(event.fields.get("dropped", 0) for event in events)
        assert len(rounds) + dropped == recorded
        assert rounds[-1] == recorded

    asyncio.run(play())


# --- reading -----------------------------------------------------------------------------------


def test_a_reader_knows_what_a_run_waits_for_again_after_a_round():
    entries, view = Entries(), RunView()
    waits = Waiting(reason="waiting for workers: 1 of 2 are connected (a)", what="workers")
    for at, event in enumerate((waits, waits, Opened(round=1), Committed(round=1), waits, waits)):
        if entries.record_of(event) is not None:
            view.add(float(at), event)
    assert view.waiting == (4.0, waits)


def test_a_torn_line_of_a_journal_file_does_not_swallow_the_next_one(tmp_path):
    for event in (Disconnected(reason="first"), Disconnected(reason="second")):
        journal = JournalFile(tmp_path, "f")
        journal.record(event)
        journal.write()
        file = tmp_path / "journal.jsonl"
        file.write_bytes(file.read_bytes() + b"[" * 100_000 + b'\n{"torn')
    assert [event.fields["reason"] for event in read_journal_file(tmp_path)] == ["first", "second"]


def entry(number: int, time: datetime, session: str = "s", **fields: Any) -> bytes:
    event = Event(
        federation="f",
        event="opened",
        time=time.isoformat(timespec="milliseconds"),
        session=session,
        number=number,
        run="r",
        fields=fields,
    )
    return encode(event)


async def put(broker: MemoryBroker, *bodies: bytes) -> None:
    link = await broker.open()
    for body in bodies:
        await link.publish(body, Properties(), exchange="", keys=[TOPOLOGY.journal])
    await link.close()


async def test_other_messages_in_the_stream_are_skipped(broker):
    now = datetime.now(UTC)
    foreign = entry(2, now).replace(b"\xaafederation\xa1f", b"\xaafederation\xa1g")
    await put(broker, b"rubbish", foreign, entry(1, now, round=1))
    assert [event.fields for event in await read(broker)] == [{"round": 1}]


async def test_reading_since_a_time(broker):
    now = datetime.now(UTC)
    times = [now - timedelta(minutes=minutes) for minutes in (50, 40, 0)]
    await put(broker, *(entry(number, time) for number, time in enumerate(times, start=1)))
    events = await read(broker, since=now - timedelta(minutes=45))
    assert [event.number for event in events] == [2, 3]
    assert await read(broker, since=now + timedelta(minutes=5)) == []


async def test_an_empty_journal_has_no_events_and_a_missing_one_is_an_error(broker):
    assert await read(broker) == []
    with pytest.raises(UsageError, match="federation f has no journal"):
        await read(MemoryBroker())


async def test_a_live_reader_continues_after_an_outage_without_duplicates(broker):
    now = datetime.now(UTC)
    seen: asyncio.Queue[int] = asyncio.Queue()
    waited: list[str] = []

    async def follow() -> None:
        async for event in read_journal(broker, TOPOLOGY, live=True, waiting=waited.append):
            seen.put_nowait(event.number)

    task = asyncio.create_task(follow())
    async with asyncio.timeout(PATIENCE_S):
        await put(broker, entry(1, now), entry(2, now))
        assert [await seen.get(), await seen.get()] == [1, 2]
        for link in list(broker.links):
            link.cut()
        await put(broker, entry(2, now), entry(3, now))  # 2 was not confirmed to its sender
        assert await seen.get() == 3
        assert waited
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_live_reader_continues_with_the_stream_of_a_broker_that_lost_its_data(broker):
    now, seen = datetime.now(UTC), asyncio.Queue[tuple[str, int]]()

    async def follow() -> None:
        async for event in read_journal(broker, TOPOLOGY, live=True, backoff=Backoff(first_s=0.01)):
            seen.put_nowait((event.session, event.number))

    task = asyncio.create_task(follow())
    async with asyncio.timeout(PATIENCE_S):
        await put(broker, *(entry(number, now) for number in (1, 2, 3)))
        assert [await seen.get() for _ in range(3)] == [("s", 1), ("s", 2), ("s", 3)]
        for link in list(broker.links):
            link.cut()
        del broker.queues[TOPOLOGY.journal]
        link = await broker.open()
        await link.declare(TOPOLOGY.shared())
        await put(broker, entry(1, now, session="t"))
        assert await seen.get() == ("t", 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- sentences ---------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = sorted(
    {"round", "worker", "reason", "num_examples", "loss", "metrics", "silent_s", "pause_s", "asked"}
)


@given(
    st.sampled_from(sorted(REGISTRY)) | st.text(max_size=10),
    st.dictionaries(st.sampled_from(KEYS), anything),
)
def test_every_event_has_a_sentence_whatever_its_fields(what, fields):
    assert isinstance(from_fields(what, fields).sentence(), str)


async def test_an_internal_error_ends_the_journal_and_not_the_run(broker, capsys):
    link = Faulty(await broker.open(), [ValueError("what nobody thought of")])
    journal = Journal(TOPOLOGY)
    async with published(journal, link) as task:
        for _ in range(3):
            journal.record(from_fields("counted", {"round": 1}))
            await drained(journal)
            await asyncio.sleep(0)
        assert not task.done()
    async with published(journal, link) as task:  # also over the next link
        journal.record(from_fields("counted", {"round": 2}))
        await drained(journal)
        assert not task.done()
    errors = capsys.readouterr().err
    assert errors.count("the journal cannot be published") == 1
    assert "the run continues without a journal" in errors


async def test_an_event_that_cannot_be_journalled_costs_one_entry(broker, capsys):
    journal = Journal(TOPOLOGY)
    watchers = Watchers(journal)
    async with published(journal, await broker.open()):
        for name in ("counted", "x" * 65, "counted"):
            watchers.record(from_fields(name, {"round": 1}))
        await drained(journal)
    assert [(event.event, event.number) for event in raw(broker)] == [
        ("counted", 1),
        ("counted", 2),
    ]
    assert "Journal cannot show the event 'xxx" in capsys.readouterr().err


async def test_a_denied_reader_learns_which_permission_is_missing(broker, monkeypatch):
    async def refused(*_: object, **__: object) -> None:
        raise AccessRefused("the broker does not let user 'r' read queue 'f.journal'")

    monkeypatch.setattr(MemoryLink, "newest", refused)
    events = read_journal(broker, TOPOLOGY)
    with pytest.raises(BrokerError, match=r"'r' read queue .*; grant the user permission to read"):
        async for _ in events:
            pass


def test_the_command_shows_every_event_that_names_a_worker(tmp_path):
    missing = (Doing("ada", "training", 3, 40), Doing("bob", "gone"))
    told = [
        ("opened", {"round": 1, "asked": ["ada", "bob"], "needed": 2}),
        ("counted", {"round": 1, "worker": "ada", "num_examples": 1}),
        (
            "waiting",
            Waiting(reason="still waiting", what="updates", round=1, missing=missing).fields(),
        ),
        ("frozen_sent", {"workers": ["ada"], "digest": "d" * 64}),
        ("committed", {"round": 1, "participants": ["ada"]}),
        ("joined", {"worker": "adam"}),
        ("finished", {"reason": "ada"}),
    ]
    file = JournalFile(tmp_path, "f")
    for name, fields in told:
        file.record(from_fields(name, fields))
    file.write()

    def shown(worker: str) -> list[str]:
        flags = ["--run", str(tmp_path), "--worker", worker, "--json"]
        lines = CliRunner().invoke(journal, flags, catch_exceptions=False).output.splitlines()
        return [json.loads(line)["event"] for line in lines]

    assert shown("ada") == ["opened", "counted", "waiting", "frozen_sent", "committed"]
    assert shown("bob") == ["opened", "waiting"]


async def test_following_says_once_that_there_is_no_journal_yet(monkeypatch):
    from fluffle_coordinator.cli import journal_source

    warnings: asyncio.Queue[str] = asyncio.Queue()
    monkeypatch.setattr(journal_source, "warn", warnings.put_nowait)
    following = journal_source.events_on_broker(MemoryBroker(), TOPOLOGY, live=True)
    first = asyncio.create_task(anext(following))
    warning = await asyncio.wait_for(warnings.get(), 60)
    assert "(federation f has no journal on this broker yet; to list the broker's" in warning
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert warnings.empty()


async def test_an_unreachable_broker_is_reported_once(capsys, monkeypatch):
    from fluffle_coordinator.cli import journal_source

    class Down:
        address = "nowhere"

        async def open(self) -> Link:
            raise LinkLost("refused")

    monkeypatch.setattr(journal_source, "_GIVE_UP_S", 1.0)
    with pytest.raises(BrokerError, match="no broker at nowhere"):
        await anext(journal_source.events_on_broker(Down(), TOPOLOGY))
    assert capsys.readouterr().err.count("cannot read the journal now") == 1


@pytest.mark.parametrize(
    ("time", "moment"),
    [
        ("2026-01-02T03:04:05+00:00", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05", None),  # nobody knows in which zone
        ("yesterday", None),
    ],
)
def test_only_a_time_with_its_zone_is_a_moment(time, moment):
    assert Event(federation="f", session="s", number=1, event="note", time=time).moment == moment
