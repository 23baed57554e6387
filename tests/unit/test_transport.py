"""What of the transport contract needs no broker."""

from __future__ import annotations

import asyncio

import pytest

from fluffle_common.errors import LinkLost
from fluffle_common.memory import MemoryBroker
from fluffle_common.topology import Queue
from fluffle_common.transport import Blocking, Properties


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
