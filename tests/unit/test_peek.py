"""Looking at queues over the broker in memory: what is shown, what is refused, what is left."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from fluffle_broker.inspect.browse import borrowed, is_classic
from fluffle_broker.inspect.peek import full_name, peek
from fluffle_common.errors import BrokerError, UsageError
from fluffle_common.protocol.messages import Event, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.messaging import Route, send, send_tensors
from fluffle_common.transport.once import open_once

TOPOLOGY = Topology("f")


@pytest.fixture
async def broker() -> MemoryBroker:
    made = MemoryBroker()
    link = await made.open()
    await link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w1")])
    return made


@pytest.fixture
async def link(broker: MemoryBroker) -> AsyncIterator[MemoryLink]:
    opened = await broker.open()
    yield opened
    await opened.close()


async def put_updates(link: MemoryLink, count: int) -> None:
    for number in range(1, count + 1):
        message = Update(
            federation="f", run="r", round=number, base="b", worker="w1", num_examples=1, seconds=0
        )
        route = Route(TOPOLOGY.results, ["update.w1"])
        await send_tensors(link, message, {"x": np.ones(2, np.float32)}, route)


async def drain(link: MemoryLink, queue: str) -> list[bytes]:
    found = []
    while (delivery := await link.get(queue)) is not None:
        found.append(delivery.body)
        delivery.ack()
    return found


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("updates", "f.updates"),
        ("f.updates", "f.updates"),
        ("inbox.w.1", "f.inbox.w.1"),
        ("f.outbox.w1", "f.outbox.w1"),
        ("journal", "f.journal"),
    ],
)
def test_a_queue_may_be_named_with_the_federation_or_without(name, full):
    assert full_name(TOPOLOGY, name) == full


@pytest.mark.parametrize("name", ["update", "other.updates", "f.tap.1", "", "f."])
def test_a_name_of_no_queue_is_an_error_that_names_those_there_are(name):
    with pytest.raises(UsageError, match=r"choose updates, presence"):
        full_name(TOPOLOGY, name)


async def test_messages_are_shown_from_the_head_and_left_as_they_were(broker, link):
    await put_updates(link, 4)
    before = [stored.body for stored in broker.queues["f.updates"].ready]
    for _ in range(3):
        peeked = await peek(await broker.open(), TOPOLOGY, "updates", 3)
    assert [decoded.round for decoded in peeked.messages] == [1, 2, 3]
    assert peeked.messages[0].tensors[0].mean == 1.0
    assert peeked.counts == (4, 0)
    assert await drain(link, "f.updates") == before


async def test_peeking_at_what_is_read_waits_for_nobody(broker, link):
    reader = await link.consume("f.updates", prefetch=1)
    await put_updates(link, 3)
    first = await anext(reader)
    peeked = await peek(await broker.open(), TOPOLOGY, "updates", 5)
    assert [decoded.round for decoded in peeked.messages] == [2, 3]
    first.ack()
    second = await anext(reader)
    assert second.redelivered
    second.ack()
    assert not (await anext(reader)).properties.headers.keys() - {
        "round", "worker", "num_examples", "bytes",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("queue", "who"),
    [("inbox.w1", "worker w1 takes messages"), ("presence", "the coordinator takes messages")],
)
async def test_a_queue_that_is_read_as_it_fills_is_refused(broker, link, queue, who):
    await link.consume(f"f.{queue}", prefetch=1, exclusive=True)
    with pytest.raises(UsageError, match=f"{who}.*fluffle tap --federation f"):
        await peek(await broker.open(), TOPOLOGY, queue, 1)


async def test_the_mail_of_a_worker_that_is_away_is_shown(broker, link):
    await link.publish(b"junk", Properties(), exchange=TOPOLOGY.work, keys=["w1"])
    (decoded,) = (await peek(await broker.open(), TOPOLOGY, "inbox.w1", 5)).messages
    assert "msgpack" in decoded.wrong


async def test_an_outbox_is_refused_since_its_parts_are_counted(broker, link):
    with pytest.raises(UsageError, match="would look like a loss"):
        await peek(link, TOPOLOGY, "outbox.w1", 1)


@pytest.mark.parametrize(
    ("queue", "why"),
    [
        ("inbox.w9", "worker w9 has not been connected"),
        ("updates", "nobody of federation g has connected"),
    ],
)
async def test_a_queue_that_is_not_there_says_why_that_may_be(broker, link, queue, why):
    topology = TOPOLOGY if "inbox" in queue else Topology("g")
    with pytest.raises(UsageError, match=why):
        await peek(link, topology, queue, 1)
    assert f"{topology.federation}.{queue}" not in broker.queues


async def test_a_quorum_queue_is_refused_and_not_touched(broker):
    quorum = Topology("q", "quorum")
    sender = await broker.open()
    await sender.declare(quorum.shared())
    await sender.publish(b"x", Properties(), exchange="", keys=["q.updates"])
    with pytest.raises(UsageError, match=r"not a classic queue.*fluffle tap.*fluffle journal"):
        await peek(await broker.open(), Topology("q"), "updates", 1)
    assert not (await sender.get("q.updates")).redelivered


async def test_of_the_journal_the_last_entries_are_shown(broker, link):
    for number in range(1, 6):
        event = Event(federation="f", event="opened", time="t", session="s", number=number)
        await send(link, event, Route("", [TOPOLOGY.journal]))
    for count, expected in ((2, [4, 5]), (50, [1, 2, 3, 4, 5])):
        peeked = await peek(await broker.open(), TOPOLOGY, "journal", count)
        assert [decoded.message.number for decoded in peeked.messages] == expected


async def test_no_more_is_held_than_may_be(broker, link):
    for body in (b"a" * 10, b"b" * 10, b"c" * 10):
        await link.publish(body, Properties(), exchange="", keys=["f.updates"])
    async with borrowed(link, "f.updates", count=5, most_bytes=15) as deliveries:
        assert len([delivery async for delivery in deliveries]) == 2
        assert (await link.counts("f.updates")).ready == 1
    assert (await link.counts("f.updates")).ready == 3


async def test_what_is_held_comes_back_when_we_fail(broker, link):
    await put_updates(link, 2)
    with pytest.raises(RuntimeError):
        async with borrowed(link, "f.updates", count=2, most_bytes=100_000) as deliveries:
            assert len([delivery async for delivery in deliveries]) == 2
            raise RuntimeError
    assert (await link.counts("f.updates")).ready == 2


async def test_a_broker_that_is_away_is_one_line_that_says_what_to_do():
    broker = MemoryBroker()
    broker.stop()
    with pytest.raises(BrokerError, match="no broker at memory.*fluffle broker up"):
        async with open_once(broker):
            pass
    broker.start()
    with pytest.raises(BrokerError, match="was lost"):
        async with open_once(broker) as link:
            broker.stop()
            await link.get("q")


async def test_who_may_not_look_is_told_so_and_not_that_the_queue_is_of_another_type(monkeypatch):
    link = await MemoryBroker().open()

    async def refuse(_: object) -> None:
        raise BrokerError("the broker does not let user 'w' configure queue 'f.rejected'")

    monkeypatch.setattr(link, "declare", refuse)
    with pytest.raises(BrokerError, match="does not let user 'w'"):
        await is_classic(link, TOPOLOGY.find(TOPOLOGY.rejected))
