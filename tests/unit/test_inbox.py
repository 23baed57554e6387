"""What a worker refuses, and where that goes."""

from __future__ import annotations

import asyncio

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.topology import Exchange, Topology
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker
from fluffle_worker.inbox import Refusals

NAMES = Topology("f")
WRONG = MalformedMessage("it is no mail", "kind")


async def test_what_is_refused_before_anybody_can_keep_it_waits_until_somebody_can():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(NAMES.queues_of("w"))
    await link.publish(b"x", Properties(), exchange="", keys=[NAMES.inbox("w")])
    refusals = Refusals(NAMES, "w")
    await refusals.refuse(link, await link.get(NAMES.inbox("w")), WRONG)
    assert link.held, "it is ours still: dying now loses nothing"
    await link.declare(NAMES.shared())
    await refusals.send_waiting(link)
    assert not link.held
    kept = await link.get(NAMES.rejected)
    assert (kept.exchange, kept.keys) == (NAMES.results, ("rejected.w",))
    assert kept.properties.headers["from"] == NAMES.inbox("w")


async def test_what_is_refused_while_a_coordinator_makes_where_it_goes_is_not_lost():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(NAMES.queues_of("w"))
    await link.publish(b"x", Properties(), exchange="", keys=[NAMES.inbox("w")])
    shared = NAMES.shared()
    await link.declare([one for one in shared if isinstance(one, Exchange)])
    delivery = await link.get(NAMES.inbox("w"))
    refusing = asyncio.ensure_future(Refusals(NAMES, "w").refuse(link, delivery, WRONG))
    for _ in range(5):
        await asyncio.sleep(0)
    assert link.held, "nothing is bound yet"
    await link.declare(shared)
    await refusing
    assert not link.held
    assert await link.get(NAMES.rejected) is not None


async def test_what_waits_is_let_go_of_with_its_link():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(NAMES.queues_of("w"))
    await link.publish(b"x", Properties(), exchange="", keys=[NAMES.inbox("w")])
    refusals = Refusals(NAMES, "w")
    await refusals.refuse(link, await link.get(NAMES.inbox("w")), WRONG)
    link.cut()
    refusals.forget()
    again = await broker.open()
    await again.declare(NAMES.shared())
    await refusals.send_waiting(again)
    assert await again.get(NAMES.rejected) is None
    assert (await again.get(NAMES.inbox("w"))).redelivered
