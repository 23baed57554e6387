"""Peeking at queues on the in-memory broker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from fluffle_broker.inspect.peek import borrowed, full_name, is_classic, peek
from fluffle_common.errors import BrokerError, UsageError
from fluffle_common.protocol.messages import Event, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.messaging import Route, send, send_tensors
from fluffle_common.transport.open_once import open_once

TOPOLOGY = Topology("f")


@pytest.fixture
async def broker() -> MemoryBroker:
    opened = MemoryBroker()
    link = await opened.open()
    await link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w1")])
    return opened


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
    bodies = []
    while (delivery := await link.get(queue)) is not None:
        bodies.append(delivery.body)
        delivery.ack()
    return bodies


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("updates", "f.updates"),
        ("f.updates", "f.updates"),
        ("inbox.w.1", "f.inbox.w.1"),
        ("journal", "f.journal"),
    ],
)
def test_a_queue_name_may_include_the_federation(name, full):
    assert full_name(TOPOLOGY, name) == full


@pytest.mark.parametrize("name", ["update", "other.updates", "f.tap.1", "outbox.w1", "", "f."])
def test_an_unknown_queue_is_an_error_that_lists_the_queues(name):
    with pytest.raises(UsageError, match=r"choose updates, presence"):
        full_name(TOPOLOGY, name)


async def test_messages_are_read_from_the_head_and_left_unchanged(broker, link):
    await put_updates(link, 4)
    before = [stored.body for stored in broker.queues["f.updates"].ready]
    for _ in range(3):
        peeked = await peek(await broker.open(), TOPOLOGY, "updates", 3)
    assert [decoded.round for decoded in peeked.messages] == [1, 2, 3]
    assert peeked.messages[0].tensors[0].mean == 1.0
    assert peeked.counts == (4, 0)
    assert await drain(link, "f.updates") == before


async def test_updates_can_be_peeked_at_while_they_are_consumed(broker, link):
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
    [
        ("inbox.w1", "being read by worker w1"),
        ("presence", "being read by the coordinator"),
    ],
)
async def test_a_queue_with_a_consumer_is_refused(broker, link, queue, who):
    await link.consume(f"f.{queue}", prefetch=1, exclusive=True)
    with pytest.raises(UsageError, match=f"{who}.*fluffle tap --federation f"):
        await peek(await broker.open(), TOPOLOGY, queue, 1)


async def test_the_inbox_of_an_absent_worker_is_shown(broker, link):
    await link.publish(b"junk", Properties(), exchange=TOPOLOGY.work, keys=["w1"])
    (decoded,) = (await peek(await broker.open(), TOPOLOGY, "inbox.w1", 5)).messages
    assert "msgpack" in decoded.wrong


@pytest.mark.parametrize(
    ("queue", "why"),
    [
        ("inbox.w9", "worker w9 has not connected"),
        ("updates", "no process of federation g has connected"),
    ],
)
async def test_a_missing_queue_is_an_error_with_the_likely_reason(broker, link, queue, why):
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


async def test_the_last_entries_of_the_journal_are_shown(broker, link):
    for number in range(1, 6):
        event = Event(federation="f", event="opened", time="t", session="s", number=number)
        await send(link, event, Route("", [TOPOLOGY.journal]))
    for count, expected in ((2, [4, 5]), (50, [1, 2, 3, 4, 5])):
        peeked = await peek(await broker.open(), TOPOLOGY, "journal", count)
        assert [decoded.message.number for decoded in peeked.messages] == expected


async def test_borrowing_stops_at_the_size_limit(broker, link):
    for body in (b"a" * 10, b"b" * 10, b"c" * 10):
        await link.publish(body, Properties(), exchange="", keys=["f.updates"])
    other = await broker.open()
    async with borrowed(other, "f.updates", count=5, most_bytes=15) as deliveries:
        assert len([delivery async for delivery in deliveries]) == 2
        assert (await link.counts("f.updates")).ready == 1
    assert (await link.counts("f.updates")).ready == 3


async def test_borrowed_messages_are_returned_after_an_error(broker, link):
    await put_updates(link, 2)
    other = await broker.open()
    with pytest.raises(RuntimeError):
        async with borrowed(other, "f.updates", count=2, most_bytes=100_000) as deliveries:
            assert len([delivery async for delivery in deliveries]) == 2
            raise RuntimeError
    assert (await link.counts("f.updates")).ready == 2


async def test_an_unreachable_broker_is_one_line_with_the_remedy():
    broker = MemoryBroker()
    broker.stop()
    with pytest.raises(BrokerError, match="no broker at memory.*fluffle broker up"):
        async with open_once(broker):
            pass
    broker.up = True
    with pytest.raises(BrokerError, match="was lost"):
        async with open_once(broker) as link:
            broker.stop()
            await link.get("q")


async def test_a_missing_permission_is_not_mistaken_for_another_queue_type(monkeypatch):
    link = await MemoryBroker().open()

    async def refuse(_: object) -> None:
        raise BrokerError("the broker does not let user 'w' configure queue 'f.rejected'")

    monkeypatch.setattr(link, "declare", refuse)
    with pytest.raises(BrokerError, match="does not let user 'w'"):
        await is_classic(link, TOPOLOGY.find(TOPOLOGY.rejected))
