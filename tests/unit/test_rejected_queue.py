"""Rejected messages that wait to be published."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.messages import Verdict
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import MinimalHello
from fluffle_common.transport.base import Delivery, Link, Properties
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.messaging import CUT, rejection
from fluffle_common.transport.rabbitmq import frames
from fluffle_coordinator.machine import machine
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.effects import Judge, Welcome
from fluffle_coordinator.machine.events import Arrived
from fluffle_coordinator.service import rejected_queue
from fluffle_coordinator.service.outbox import Outbox
from fluffle_coordinator.service.serial_queue import SerialQueue
from fluffle_coordinator.service.settings import CoordinatorSettings

TOPOLOGY = Topology("f")


@pytest.fixture
async def link() -> MemoryLink:
    link = await MemoryBroker().open()
    await link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w")])
    return link


async def delivered(link: Link, body: bytes) -> Delivery:
    await link.publish(body, Properties(), exchange="", keys=[TOPOLOGY.updates])
    delivery = await link.get(TOPOLOGY.updates)
    assert delivery is not None
    return delivery


def outbox(link: Any) -> Outbox:
    async def a_link() -> Link:
        return link

    recorded: list[RunEvent] = []
    settings = CoordinatorSettings("f", rs.Rules(rounds=1))
    return Outbox(TOPOLOGY, "r", settings, link=lambda: link, a_link=a_link, record=recorded.append)


SMALLEST_FRAME_BYTES = 4096  # that a broker can ask for


@pytest.mark.parametrize("header", ["字" * 160, "v" * 100, 2**40])
async def test_a_rejection_fits_into_the_smallest_frame(link, header):
    # The broker would close the connection, and deliver the message again over the next one.
    headers = {f"header-{number}": header for number in range(60)}
    own: Any = {"type": "t" * 255, "message_id": "字" * 85}
    await link.publish(b"x", Properties(**own, headers=headers), exchange="", keys=["f.updates"])
    delivery = await link.get("f.updates")
    assert delivery is not None
    delivery.queue = "f" * 64 + ".inbox." + "w" * 64
    reason = "tensor '" + "字" * 2000
    _, properties = rejection(delivery, MalformedMessage(reason, "not_finite"))
    published = frames.publish(
        1,
        2**16,
        exchange="",
        key="",
        kind=properties.type,
        message_id=properties.message_id,
        user="u" * 255,
        headers=properties.headers,
        durable=True,
    )
    assert len(published) <= SMALLEST_FRAME_BYTES
    assert properties.headers["reason"] == reason[:505]
    assert properties.headers["header-0"] == header


async def test_waiting_rejections_take_little_memory(link, monkeypatch):
    monkeypatch.setattr(rejected_queue, "_MAX_BYTES", 300_000)
    out = outbox(link)
    valid = MalformedMessage("the message belongs to run other", "run")
    bodies = [bytes([number]) * 200_000 for number in range(3)]
    held = [await delivered(link, body) for body in bodies]
    for delivery, wrong in zip(held, [MalformedMessage("garbage"), valid, valid], strict=True):
        out.reject(delivery, wrong)
    assert [len(delivery.body) for delivery in held] == [2**16, 200_000, 2**16]
    running = asyncio.ensure_future(out.run())
    await out.drained()
    for body, size_bytes in zip(bodies, [2**16, 200_000, 2**16], strict=True):
        kept = await link.get(TOPOLOGY.rejected)
        assert kept.body == body[:size_bytes]
        assert kept.properties.headers.get(CUT) == (200_000 if size_bytes == 2**16 else None)
    last = await delivered(link, bodies[0])
    out.reject(last, valid)
    assert len(last.body) == 200_000  # the others are gone
    running.cancel()


async def test_waiting_rejections_take_little_memory_however_many_small_ones_there_are(
    link, monkeypatch
):
    monkeypatch.setattr(rejected_queue, "_MAX_BYTES", 300_000)
    out = outbox(link)
    held = [await delivered(link, b"x" * 60_000) for _ in range(20)]
    for number, delivery in enumerate(held):
        out.reject(delivery, MalformedMessage("garbage", ("malformed", "run")[number % 2]))
    assert [len(delivery.body) for delivery in held] == [60_000] * 5 + [2**10] * 15


async def test_a_waiting_rejection_does_not_keep_the_frames_that_raised_it(link):
    class Buffer:
        pass

    def decode() -> None:
        buffer = Buffer()
        buffers.append(weakref.ref(buffer))
        try:
            raise ValueError("no msgpack")
        except ValueError as error:
            raise MalformedMessage(str(error)) from None

    buffers: list[weakref.ref[Buffer]] = []
    out, delivery = outbox(link), await delivered(link, b"x")
    try:
        decode()
    except MalformedMessage as wrong:
        out.reject(delivery, wrong)
    gc.collect()
    assert buffers[0]() is None


async def test_work_does_not_wait_for_rejections(link):
    class Slow:
        """A link that never confirms a rejected message."""

        def __getattr__(self, name: str) -> Any:
            return getattr(link, name)

        async def publish(self, body: bytes, properties: Properties, **route: Any) -> None:
            if route["keys"] == [TOPOLOGY.rejected]:
                await asyncio.Event().wait()
            await link.publish(body, properties, **route)

    out = outbox(Slow())
    out.reject(await delivered(link, b"x"), MalformedMessage("garbage"))
    running = asyncio.ensure_future(out.run())
    verdict = Verdict(federation="f", run="r", round=1, base="b", outcome="late", reason="late")
    out._put(out._to(verdict, ["w"]))
    async with asyncio.timeout(60):
        while await link.get(TOPOLOGY.inbox("w")) is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
    running.cancel()


@pytest.mark.parametrize("what", ["verdict", "refusal", "binding"])
async def test_work_does_not_wait_for_the_answers_to_a_worker_that_sends_too_much(link, what):
    await link.declare(TOPOLOGY.of_worker("other"))
    out, state = outbox(link), machine.start(rs.Rules(rounds=1), "r", 0.0)
    for number in range(1000):
        if what == "refusal":
            out.refuse(MinimalHello(2, "w", f"s{number}"), "malformed", "malformed")
        elif what == "binding":
            out.bind("w", f"s{number}", again=True)
        else:
            ticket = rs.Ticket("w", number + 1)
            late = Arrived(0.0, "r", rs.Handle(1, number), ticket, 1, "b", 1, 0.0, 0)
            out.perform(Judge(late, "late", "round 1 was committed"), state, None)
    out.perform(Welcome("other"), state, None)
    out.bind("w", "last", again=True)  # dropped, and not taken for done
    running = asyncio.ensure_future(out.run())
    async with asyncio.timeout(60):
        await out.drained()
    waiting = await link.counts(TOPOLOGY.inbox("w"))
    assert waiting is not None
    assert waiting.ready == (0 if what == "binding" else 4)
    assert await link.get(TOPOLOGY.inbox("other")) is not None
    out.bind("w", "last", again=False)
    assert not out._jobs.idle
    running.cancel()


async def test_a_lost_link_does_not_end_the_rejections(link):
    out = outbox(link)
    out.reject(await delivered(link, b"x"), MalformedMessage("garbage"))
    link.cut()
    running = asyncio.ensure_future(out.run())
    async with asyncio.timeout(60):
        await out.drained()
    assert not running.done()
    with pytest.raises(LinkLost):
        await link.get(TOPOLOGY.rejected)
    running.cancel()


async def test_jobs_that_come_all_the_time_do_not_hold_up_the_end():
    jobs, done = SerialQueue(), []

    async def job() -> None:
        jobs.put(job)  # as a flood of rejected messages
        await asyncio.sleep(0)
        done.append(job)

    jobs.put(job)
    jobs.put(job)
    running = asyncio.ensure_future(jobs.run())
    async with asyncio.timeout(60):
        await jobs.drained()
    assert len(done) >= 2
    running.cancel()
