"""Rejection of malformed messages to a worker."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import Echo, Fit, Plan
from fluffle_common.protocol.topology import Exchange, Topology
from fluffle_common.protocol.transfer_parts import pack
from fluffle_common.protocol.wire_format import decode, encode
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker
from fluffle_worker.inbox import Refusals, check_message, read_work

NAMES = Topology("f")
WRONG = MalformedMessage("it is no mail", "kind")


async def test_what_is_refused_before_anybody_can_keep_it_waits_until_somebody_can():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(NAMES.queues_of("w"))
    await link.publish(b"x", Properties(), exchange="", keys=[NAMES.inbox("w")])
    refusals = Refusals(NAMES, "w", lambda _: None)
    await refusals.refuse(link, await link.get(NAMES.inbox("w")), WRONG)
    assert link.unacked, "it is ours still: dying now loses nothing"
    await link.declare(NAMES.shared())
    await refusals.send_waiting(link)
    assert not link.unacked
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
    refusing = asyncio.ensure_future(
        Refusals(NAMES, "w", lambda _: None).refuse(link, delivery, WRONG)
    )
    for _ in range(5):
        await asyncio.sleep(0)
    assert link.unacked, "nothing is bound yet"
    await link.declare(shared)
    await refusing
    assert not link.unacked
    assert await link.get(NAMES.rejected) is not None


async def test_what_waits_is_let_go_of_with_its_link():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(NAMES.queues_of("w"))
    await link.publish(b"x", Properties(), exchange="", keys=[NAMES.inbox("w")])
    refusals = Refusals(NAMES, "w", lambda _: None)
    await refusals.refuse(link, await link.get(NAMES.inbox("w")), WRONG)
    link.cut()
    refusals.forget()
    again = await broker.open()
    await again.declare(NAMES.shared())
    await refusals.send_waiting(again)
    assert await again.get(NAMES.rejected) is None
    assert (await again.get(NAMES.inbox("w"))).redelivered


async def test_only_what_is_not_for_a_worker_is_refused_when_its_inbox_is_emptied():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare([*NAMES.shared(), *NAMES.queues_of("w")])
    bodies = [fit_with({}), encode(Echo(federation="f", session="s", number=1)), fit_with({})]
    for body in bodies:
        await link.publish(body, Properties(), exchange="", keys=[NAMES.inbox("w")])
    await Refusals(NAMES, "w", lambda _: None).drain(link, NAMES.inbox("w"), check_message)
    assert not link.unacked
    assert await link.get(NAMES.inbox("w")) is None
    kept = await link.get(NAMES.rejected)
    assert (bytes(kept.body), kept.properties.headers["cause"]) == (bodies[1], "kind")
    assert await link.get(NAMES.rejected) is None


async def test_only_a_bounded_number_of_refused_messages_waits():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(NAMES.queues_of("w"))
    refusals = Refusals(NAMES, "w", lambda _: None)
    for _ in range(101):
        await link.publish(b"x", Properties(), exchange="", keys=[NAMES.inbox("w")])
        await refusals.refuse(link, await link.get(NAMES.inbox("w")), WRONG)
    assert len(link.unacked) == 100


def fit_with(beside: dict[str, dict[str, np.ndarray]]) -> bytes:
    fit = Fit(federation="f", run="r", round=1, base="b", evaluate=False, plan=Plan())
    return pack(fit, {"w": np.ones(3, np.float32)}, beside)[1]


def test_a_worker_takes_what_is_broadcast_and_passes_over_groups_that_it_does_not_know():
    body = fit_with({"later": {"w": np.array([np.nan])}, "extra": {"c": np.full(2, 0.5)}})
    check_message(body, "f")
    weights, broadcast, _ = read_work(*decode(body))
    assert {name: one.tolist() for name, one in weights.items()} == {"w": [1, 1, 1]}
    assert {name: one.tolist() for name, one in broadcast.items()} == {"c": [0.5, 0.5]}


def test_a_broadcast_that_is_not_finite_is_refused():
    with pytest.raises(MalformedMessage, match="tensor 'c' has 1 value that is NaN") as wrong:
        check_message(fit_with({"extra": {"c": np.array([np.nan])}}), "f")
    assert wrong.value.cause == "not_finite"
