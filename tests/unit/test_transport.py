"""What of the transport contract needs no broker."""

from __future__ import annotations

import asyncio

import pytest

from fluffle_common.errors import LinkLost
from fluffle_common.protocol.events import Blocked, RunEvent, Unblocked
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.base import Blocking, Properties, tell_of_blocking
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.reconnect import Backoff, reconnecting


async def test_news_of_a_blocked_broker_begins_with_what_is_so_now():
    blocking = Blocking()
    blocking.set("low on disk")
    news = blocking.changes()
    assert await anext(news) == "low on disk"
    coming = asyncio.ensure_future(anext(news))
    await asyncio.sleep(0)
    blocking.set("low on disk")
    await asyncio.sleep(0)
    assert not coming.done(), "nothing has changed"
    blocking.set(None)
    assert await coming is None
    await news.aclose()


async def test_a_blocked_broker_takes_what_is_published_when_it_is_free_again():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare([Queue("q", "of a test")])
    broker.block("low on memory")
    assert link.blocked == "low on memory"
    publishing = asyncio.ensure_future(link.publish(b"x", Properties(), exchange="", keys=["q"]))
    await asyncio.sleep(0)
    assert (await link.counts("q")).ready == 0
    broker.block(None)
    await publishing
    assert link.blocked is None
    assert (await link.counts("q")).ready == 1


async def test_who_waits_for_a_blocked_broker_is_told_of_a_lost_link():
    broker = MemoryBroker()
    link = await broker.open()
    broker.block("low on memory")
    publishing = asyncio.ensure_future(link.publish(b"x", Properties(), exchange="", keys=["q"]))
    await asyncio.sleep(0)
    link.cut()
    with pytest.raises(LinkLost):
        await publishing


async def test_pauses_between_attempts_are_spread_and_said_as_they_are(monkeypatch):
    broker = MemoryBroker()
    broker.up = False
    slept: list[float] = []
    said: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        broker.up = len(slept) == 3

    monkeypatch.setattr("fluffle_common.transport.reconnect.asyncio.sleep", sleep)
    chances = iter([0.0, 0.5, 1.0])
    backoff = Backoff(first_s=0.2, most_s=0.4)
    opened = reconnecting(
        broker, backoff, lambda _, pause_s: said.append(pause_s), lambda: next(chances)
    )
    await anext(opened)
    await opened.aclose()
    assert said == slept == [0.1, pytest.approx(0.3), 0.4]


async def test_what_is_not_there_can_neither_be_bound_nor_published_to():
    broker = MemoryBroker()
    names = Topology("f")
    link = await broker.open()
    await link.declare(names.shared())
    assert await link.exists(names.results)
    assert not await link.exists("g.results")
    assert not await link.bind(names.bindings_of("w"))
    await link.declare(names.queues_of("w"))
    assert await link.bind(names.bindings_of("w"))
    with pytest.raises(LinkLost, match="no exchange"):
        await link.publish(b"x", Properties(), exchange="g.results", keys=["hello.w"])
    await link.lost()


async def test_the_blocking_of_a_broker_is_told_and_its_end():
    broker = MemoryBroker()
    link = await broker.open()
    told: asyncio.Queue[RunEvent] = asyncio.Queue()
    telling = asyncio.ensure_future(tell_of_blocking(link, told.put_nowait))
    await asyncio.sleep(0)
    broker.block("low on memory")
    assert await told.get() == Blocked(reason="low on memory")
    broker.block(None)
    assert await told.get() == Unblocked()
    telling.cancel()
