"""The page beside a coordinator, which learns everything from the broker."""

from __future__ import annotations

import asyncio

from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.memory import MemoryBroker
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
