"""The intake of the coordinator: what it holds, and what reaches the machine."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from fluffle_common.concurrency import run_all
from fluffle_common.protocol.messages import (
    Bye,
    Echo,
    Exchange,
    FirstWeights,
    Hello,
    Message,
    Update,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import MAX_HEADER_BYTES, MinimalHello, decode, encode
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.intake import Intake
from fluffle_coordinator.service.settings import CoordinatorSettings

TOPOLOGY = Topology("f")


class Coordinator:
    """The parts of a coordinator around an intake."""

    def __init__(self, link: MemoryLink, **settings: Any) -> None:
        self.link = link
        self.state = SimpleNamespace(
            run="r", has_weights=False, init_asked=None, hearing_s=0.0, link=1
        )
        self.events = asyncio.Queue[ev.Event]()
        self.rejected = asyncio.Queue[str]()
        self.refused: list[str] = []
        self.intake = Intake(
            CoordinatorSettings("f", rs.Rules(rounds=1), **settings),
            TOPOLOGY,
            task="t",
            exchanges={},
            aggregator=SimpleNamespace(max_header=MAX_HEADER_BYTES),  # type: ignore[arg-type]
            outbox=self,  # type: ignore[arg-type]
            state=lambda: self.state,  # type: ignore[arg-type, return-value]
            post=self.events.put_nowait,
            record=lambda _: None,
        )

    def bind(self, worker: str, session: str, *, again: bool) -> None:
        pass

    def reject(self, delivery: Any, wrong: Exception) -> None:
        self.rejected.put_nowait(str(wrong))
        delivery.ack()

    def was_refused(self, hello: MinimalHello) -> bool:
        return False

    def refuse(self, hello: MinimalHello, reason: str, code: str, *, report: bool) -> None:
        self.refused.append(code)

    async def read(self) -> None:
        """Read both queues until cancelled."""
        self.intake._caught_up.set()
        presence = await self.link.consume(TOPOLOGY.presence, prefetch=10)
        await run_all(
            self.intake.read_presence(presence), self.intake.consume_updates(self.link, 1)
        )

    async def send(
        self, message: Message, queue: str, payload: bytes = b"", user: str | None = None
    ) -> None:
        body, properties = encode(message, payload), Properties(user=user)
        await self.link.publish(body, properties, exchange="", keys=[queue])

    async def rejection(self) -> str:
        async with asyncio.timeout(60):
            return await self.rejected.get()

    async def event(self) -> Any:
        async with asyncio.timeout(60):
            return await self.events.get()


@pytest.fixture
async def coordinator(monkeypatch) -> Coordinator:
    monkeypatch.setattr("fluffle_coordinator.service.intake._MAX_HELD_BYTES", 1000)
    link = await MemoryBroker().open()
    await link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w")])
    return Coordinator(link)


@pytest.mark.parametrize("asked", [None, "other"])
async def test_first_weights_that_nobody_wants_occupy_no_room(coordinator, asked):
    coordinator.state.init_asked = asked
    coordinator.intake._caught_up.set()
    reading = asyncio.ensure_future(coordinator.intake.consume_updates(coordinator.link, 1))
    unwanted = FirstWeights(federation="f", run="r", worker="w")
    for _ in range(10):  # together larger than the room
        await coordinator.send(unwanted, TOPOLOGY.updates, bytes(400))
    async with asyncio.timeout(60):
        while (await coordinator.link.counts(TOPOLOGY.updates)).ready or coordinator.link.unacked:
            assert not reading.done()
            await asyncio.sleep(0)
    assert coordinator.intake._room.used_bytes == 0
    assert coordinator.rejected.qsize() == (0 if asked is None else 10)
    reading.cancel()


async def test_parked_messages_that_need_no_room_leave_none_parked_behind_them(coordinator):
    coordinator.intake._caught_up.set()
    reading = asyncio.ensure_future(coordinator.intake.consume_updates(coordinator.link, 1))
    of = {"federation": "f", "run": "r", "worker": "w"}
    update = Update(**of, round=1, base="b", num_examples=1, seconds=0.0)
    await coordinator.send(update, TOPOLOGY.updates, bytes(900))
    held = coordinator.intake.held((await coordinator.event()).handle)
    for _ in range(5):
        await coordinator.send(FirstWeights(**of), TOPOLOGY.updates, bytes(900))
    async with asyncio.timeout(60):
        while len(coordinator.intake._room._parked) < 5:
            assert not reading.done()
            await asyncio.sleep(0)
        held.free()
        while len(coordinator.link.unacked) > 1:  # all but the update
            assert not reading.done()
            await asyncio.sleep(0)
    reading.cancel()


async def test_a_round_can_have_thousands_of_updates():
    link = await MemoryBroker().open()
    await link.declare(TOPOLOGY.shared())
    coordinator = Coordinator(link)
    coordinator.intake._caught_up.set()
    reading = asyncio.ensure_future(coordinator.intake.consume_updates(link, 1))
    of = {"federation": "f", "run": "r", "round": 1, "base": "b", "num_examples": 1}
    for number in range(3000):  # none is acknowledged until the round is on disk
        update = Update(**of, worker=f"w{number}", seconds=0.0)
        await coordinator.send(update, TOPOLOGY.updates)
    names = {(await coordinator.event()).ticket.worker for _ in range(3000)}
    assert len(names) == 3000
    reading.cancel()


async def test_a_missing_presence_queue_does_not_end_the_run(coordinator):
    link = await MemoryBroker().open()  # the queue was deleted, and its consumer is told soon
    sending = asyncio.ensure_future(coordinator.intake.send_echoes(link, 1))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not sending.done()
    await link.declare(TOPOLOGY.shared())
    async with asyncio.timeout(60):
        while not (echo := await link.get(TOPOLOGY.presence)):  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert decode(echo.body)[0].kind == "echo"
    sending.cancel()


async def test_tiny_heartbeats_cannot_stop_the_clock(coordinator):
    presence = await coordinator.link.consume(TOPOLOGY.presence, prefetch=10)
    reading = asyncio.ensure_future(coordinator.intake.read_presence(presence))
    about = {"federation": "f", "worker": "w", "session": "s", "num_examples": 1, "task": "t"}
    for heartbeat_s in (1e-9, 2.0):
        await coordinator.send(Hello(**about, heartbeat_s=heartbeat_s), TOPOLOGY.presence)
    first, second = await coordinator.event(), await coordinator.event()
    assert (first.worker.heartbeat_s, second.worker.heartbeat_s) == (0.2, 2.0)
    reading.cancel()


HELLO = Hello(federation="f", worker="w", session="s", num_examples=1, task="t", heartbeat_s=2.0)
UPDATE = Update(federation="f", run="r", worker="w", round=1, base="b", num_examples=1, seconds=0.0)
BYE = Bye(federation="f", worker="w", session="s", reason="done")
OF_ANOTHER_RUN = "the message belongs to run q, but this coordinator runs r"


@pytest.mark.parametrize(
    ("queue", "message", "reason"),
    [
        (TOPOLOGY.presence, UPDATE, "a message of kind update does not belong in the queue for h"),
        (TOPOLOGY.updates, HELLO, "a message of kind hello does not belong in the queue for upd"),
        (TOPOLOGY.updates, FirstWeights(federation="f", run="q", worker="w"), OF_ANOTHER_RUN),
        (
            TOPOLOGY.updates,
            Exchange(federation="f", run="q", worker="w", name="sum", phase="one", round=1),
            OF_ANOTHER_RUN,
        ),
    ],
)
async def test_what_does_not_belong_in_a_queue_is_rejected(coordinator, queue, message, reason):
    reading = asyncio.ensure_future(coordinator.read())
    await coordinator.send(message, queue)
    assert (await coordinator.rejection()).startswith(reason)
    assert coordinator.events.empty()
    reading.cancel()


@pytest.mark.parametrize(
    ("message", "queue"),
    [(HELLO, TOPOLOGY.presence), (BYE, TOPOLOGY.presence), (UPDATE, TOPOLOGY.updates)],
)
async def test_with_verified_users_a_worker_speaks_only_for_itself(message, queue):
    link = await MemoryBroker().open()
    await link.declare(TOPOLOGY.shared())
    coordinator = Coordinator(link, verify_users=True)
    reading = asyncio.ensure_future(coordinator.read())
    await coordinator.send(message, queue, user="v")
    assert (await coordinator.rejection()).endswith("names w as its sender, but the user v sent it")
    await coordinator.send(message, queue)
    assert (await coordinator.rejection()).endswith("its sender, but it has no user_id")
    await coordinator.send(message, queue, user="w")
    assert isinstance(await coordinator.event(), ev.Seen | ev.Left | ev.Arrived)
    reading.cancel()


async def test_with_verified_users_only_a_worker_s_own_malformed_hello_is_answered():
    link = await MemoryBroker().open()
    await link.declare(TOPOLOGY.shared())
    coordinator = Coordinator(link, verify_users=True)
    reading = asyncio.ensure_future(coordinator.read())
    malformed = HELLO.model_copy(update={"num_examples": -1})
    for user, refused in (("v", []), ("w", ["malformed"])):
        await coordinator.send(malformed, TOPOLOGY.presence, user=user)
        assert (await coordinator.rejection()).startswith("hello.num_examples: ")
        await coordinator.send(UPDATE, TOPOLOGY.presence, user="w")  # is read after it
        await coordinator.rejection()
        assert coordinator.refused == refused
    reading.cancel()


async def test_a_rejected_update_makes_room_for_the_next(coordinator):
    reading = asyncio.ensure_future(coordinator.read())
    for _ in range(3):
        await coordinator.send(UPDATE, TOPOLOGY.updates, bytes(900))
    for _ in range(3):
        arrived = await coordinator.event()
        coordinator.intake.reject(arrived.handle, "it has a NaN", "not_finite")
    assert coordinator.intake._room.used_bytes == 0
    reading.cancel()


async def test_what_is_parked_is_forgotten_with_its_link(coordinator):
    reading = asyncio.ensure_future(coordinator.read())
    for _ in range(2):
        await coordinator.send(UPDATE, TOPOLOGY.updates, bytes(900))
    await coordinator.event()
    async with asyncio.timeout(60):
        while not coordinator.intake._room._parked:  # noqa: ASYNC110
            await asyncio.sleep(0)
    coordinator.intake.link_lost()
    assert not coordinator.intake._room._parked
    reading.cancel()


async def test_updates_are_read_after_the_echo_over_each_new_link(coordinator):
    intake = coordinator.intake
    presence = await coordinator.link.consume(TOPOLOGY.presence, prefetch=10)
    reading = asyncio.ensure_future(intake.read_presence(presence))
    for number in (1, 2):
        coordinator.state.link = number
        updates = asyncio.ensure_future(intake.consume_updates(coordinator.link, number))
        await coordinator.send(UPDATE, TOPOLOGY.updates)
        echo = Echo(federation="f", session=intake._session, number=number)
        await coordinator.send(echo, TOPOLOGY.presence)
        assert isinstance(await coordinator.event(), ev.Echoed)
        assert isinstance(await coordinator.event(), ev.Arrived)
        updates.cancel()
        await asyncio.gather(updates, return_exceptions=True)
        intake.link_lost()
    reading.cancel()
