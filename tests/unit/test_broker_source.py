"""The page beside a coordinator, which learns everything from the broker."""

from __future__ import annotations

import asyncio

from fluffle_common.protocol.messages import Heartbeat
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.messaging import Route, send
from fluffle_coordinator.dashboard.broker_source import BrokerSource

TOPOLOGY = Topology("letters")


async def test_it_tells_a_federation_without_a_journal_from_one_that_does_not_exist():
    broker, said = MemoryBroker(), asyncio.Queue[str]()
    source = BrokerSource(TOPOLOGY, broker, dict, said.put_nowait)
    for entities, expected in (
        ([], "no coordinator has created federation letters at"),
        (TOPOLOGY.required(), "federation letters has no journal at"),
        (TOPOLOGY.shared(), "connected to the broker"),
    ):
        await (await broker.open()).declare(entities)
        following = asyncio.create_task(source._follow_presence())
        assert (await asyncio.wait_for(said.get(), 60)).startswith(expected)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_an_exchange_that_is_deleted_and_declared_again_is_read(monkeypatch):
    monkeypatch.setattr("fluffle_coordinator.dashboard.broker_source._BIND_EVERY_S", 0.0)
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(TOPOLOGY.shared())
    source = BrokerSource(TOPOLOGY, broker, dict)
    following = asyncio.create_task(source._follow_presence())
    await asyncio.wait_for(source._tapped.wait(), 60)
    before = source.feed.version
    broker.delete_exchange(TOPOLOGY.results)
    await link.declare(TOPOLOGY.shared())
    about = {"federation": "letters", "worker": "w1", "session": "s", "task": "t"}
    beat = Heartbeat(**about, num_examples=1, heartbeat_s=1.0)
    async with asyncio.timeout(60):
        while source.feed.version == before:
            await send(link, beat, Route(TOPOLOGY.results, ["heartbeat.w1"], durable=False))
            await asyncio.sleep(0)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
