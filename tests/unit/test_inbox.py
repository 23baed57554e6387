"""Rejection of malformed messages to a worker."""

from __future__ import annotations

import numpy as np
import pytest

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import Echo, Fit, Plan
from fluffle_common.protocol.topology import Binding, Exchange, Queue, Topology
from fluffle_common.protocol.transfer_parts import pack
from fluffle_common.protocol.wire_format import decode, encode
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_worker.inbox import Refusals, check_message, read_work

NAMES = Topology("f")
WRONG = MalformedMessage("it is no mail", "kind")


async def after_a_refusal(*declared: Exchange | Queue | Binding) -> MemoryLink:
    """Return the link of a worker that refused a message while the broker had these entities."""
    link = await MemoryBroker().open()
    await link.declare([*declared, *NAMES.queues_of("w")])
    await link.publish(b"x", Properties(), exchange="", keys=[NAMES.inbox("w")])
    delivery = await link.get(NAMES.inbox("w"))
    await Refusals(NAMES, "w", lambda _: None).refuse(link, delivery, WRONG)
    assert not link.unacked
    return link


async def test_a_refused_message_is_forwarded_with_its_origin():
    link = await after_a_refusal(*NAMES.shared())
    kept = await link.get(NAMES.rejected)
    assert (kept.exchange, kept.keys) == (NAMES.results, ("rejected.w",))
    assert kept.properties.headers["from"] == NAMES.inbox("w")


@pytest.mark.parametrize("kind", [Exchange, ()], ids=["nothing is bound", "no exchange"])
async def test_a_message_that_is_refused_before_anybody_can_keep_it_is_dropped(kind):
    link = await after_a_refusal(*(one for one in NAMES.shared() if isinstance(one, kind)))
    assert await link.get(NAMES.inbox("w")) is None


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
