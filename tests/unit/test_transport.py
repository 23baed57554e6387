"""Parts of the transport contract that need no real broker."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace

import pytest

from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.protocol.events import Blocked, RunEvent, Unblocked
from fluffle_common.protocol.messages import Welcome
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.base import Blocking, Properties, report_blocking
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.messaging import Route, check_user, send
from fluffle_common.transport.rabbitmq.link import AmqpLink
from fluffle_common.transport.reconnect import Backoff, reconnecting


@pytest.mark.parametrize(
    ("sender", "fact"), [("guest", "the user guest sent it"), (None, "it has no user_id")]
)
async def test_a_delivery_of_another_or_an_unknown_user_is_rejected(sender, fact):
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare([Queue("q", "of a test")])
    await link.publish(b"x", Properties(user=sender), exchange="", keys=["q"])
    delivery = await link.get("q")
    check_user(sender, delivery)
    with pytest.raises(MalformedMessage) as error:
        check_user("w", delivery)
    assert str(error.value) == f"the message names w as its sender, but {fact}"
    assert error.value.cause == "sender"


async def test_the_name_of_a_run_may_be_longer_than_amqp_allows_for_an_identity():
    link = await MemoryBroker().open()
    await link.declare([Queue("q", "of a test")])
    run = "\N{RABBIT}" * 64
    welcome = Welcome(federation="f", run=run, round=1, rounds=2)
    await send(link, welcome, Route("", ["q"]))
    delivery = await link.get("q")
    message_id = delivery.properties.message_id
    assert message_id == f"welcome/{run}"[: len(message_id)]
    assert 252 <= len(message_id.encode()) <= 255
    assert decode(delivery.body)[0] == welcome


async def test_publishing_waits_until_the_broker_unblocks():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare([Queue("q", "of a test")])
    broker.blocking.set("low on memory")
    assert link.blocking.reason == "low on memory"
    publishing = asyncio.ensure_future(link.publish(b"x", Properties(), exchange="", keys=["q"]))
    await asyncio.sleep(0)
    assert (await link.counts("q")).ready == 0
    broker.blocking.set(None)
    await publishing
    assert link.blocking.reason is None
    assert (await link.counts("q")).ready == 1


async def test_waiting_for_a_blocked_broker_ends_when_the_link_is_lost():
    broker = MemoryBroker()
    link = await broker.open()
    broker.blocking.set("low on memory")
    publishing = asyncio.ensure_future(link.publish(b"x", Properties(), exchange="", keys=["q"]))
    await asyncio.sleep(0)
    link.cut()
    with pytest.raises(LinkLost):
        await publishing


async def test_pauses_between_attempts_have_jitter_and_are_reported(monkeypatch):
    broker = MemoryBroker()
    broker.up = False
    slept: list[float] = []
    reported: list[str] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        broker.up = len(slept) == 3

    monkeypatch.setattr("fluffle_common.transport.reconnect.asyncio.sleep", sleep)
    chances = iter([0.0, 0.5, 1.0])
    backoff = Backoff(first_s=0.2, most_s=0.4)
    opened = reconnecting(broker, backoff, reported.append, lambda: next(chances))
    await anext(opened)
    await opened.aclose()
    assert slept == [0.1, pytest.approx(0.3), 0.4]
    assert reported == ["the broker is down"]  # once for all attempts


async def test_missing_entities_can_neither_be_bound_nor_published_to():
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


async def test_blocking_and_unblocking_are_events():
    broker = MemoryBroker()
    link = await broker.open()
    events: asyncio.Queue[RunEvent] = asyncio.Queue()
    broker.blocking.set("low on memory")
    task = asyncio.ensure_future(report_blocking(link, events.put_nowait))
    assert await events.get() == Blocked(reason="low on memory")  # the state at the beginning
    broker.blocking.set("low on memory")
    await asyncio.sleep(0)
    assert events.empty(), "nothing has changed"
    broker.blocking.set(None)
    assert await events.get() == Unblocked()
    broker.blocking.set("low on disk")
    assert await events.get() == Blocked(reason="low on disk")
    task.cancel()


async def test_the_error_of_a_cancelled_request_is_retrieved(monkeypatch):
    """Regression: asyncio printed a traceback when the link was lost just afterwards."""
    asked, is_lost, unseen = asyncio.Event(), asyncio.Event(), list[object]()

    async def probe(*_):
        asked.set()
        await is_lost.wait()
        raise LinkLost("the broker was stopped")

    connection = SimpleNamespace(blocking=Blocking(), close_reason=None)
    link = AmqpLink(connection, connection, "guest", probe)  # type: ignore[arg-type]
    monkeypatch.setattr(link, "_probe", probe)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    request = asyncio.create_task(link.exists("f.work"))
    await asked.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    is_lost.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert not unseen
