"""Bounds on the bytes that a peer can make the coordinator hold, fetch or send."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fluffle_broker.inspect.rejected import requeue
from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import wire_format as wire
from fluffle_common.protocol.messages import (
    FirstWeights,
    Heartbeat,
    Hello,
    Part,
    Transfer,
    Update,
    parsing,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import Assembly, pack
from fluffle_common.protocol.wire_format import decode
from fluffle_common.tensors.compression import compress
from fluffle_common.tensors.table import TensorEntry
from fluffle_common.tensors.weights import delta
from fluffle_common.transport.base import Properties
from fluffle_common.transport.fetch_parts import PartsGone, fetch
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.messaging import Route, reject, send_tensors
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.aggregator import Aggregator
from fluffle_coordinator.service.committer import Committer
from fluffle_coordinator.service.fetcher import Fetcher
from fluffle_coordinator.service.held_updates import Held, Room
from fluffle_coordinator.service.hello_limiter import HelloLimiter
from fluffle_coordinator.service.outbox import Outbox
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore, Saved
from fluffle_coordinator.strategy.update_checks import check_announced

TOPOLOGY = Topology("f")
MODEL = {
    "kernel": np.linspace(-1, 1, 2048, dtype=np.float32).reshape(32, 64),
    "bias": np.zeros(7, np.float32),
    "counts": np.zeros(3, np.int32),
}


def update(**changes: Any) -> Update:
    of = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": "w"}
    return Update(**of, num_examples=1, seconds=0.0, **changes)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_BYTES", 64)


# --- announcements -------------------------------------------------------------------------------


def announcement(weights: Any, encoding: Any = None) -> Update:
    message, _ = decode(pack(update(encoding=encoding), weights)[1])
    assert isinstance(message, Update)
    return message


@pytest.mark.parametrize("how", [None, "bf16", "f16", "int8", "topk:0.1", "topk:0.9"])
@pytest.mark.usefixtures("small_parts")
def test_valid_announcements_are_accepted_in_every_encoding(how):
    learnt = delta(MODEL, MODEL)
    if how is None:
        check_announced(announcement(learnt), MODEL)
    else:
        tensors, _ = compress(learnt, how, {})
        check_announced(announcement(tensors, how.partition(":")[0]), MODEL)


@pytest.mark.parametrize(
    ("encoding", "change", "reason"),
    [
        (None, {"kernel": np.zeros((64, 32), np.float32)}, "'kernel' has shape (64, 32)"),
        (None, {"kernel": np.zeros((32, 64), np.float64)}, "'kernel' is float64"),
        (None, {"counts": np.zeros(3, np.int32)}, "'counts' is int32"),
        (None, {"more": np.zeros(10**6)}, "unknown more"),
        (None, {"kernel": None}, "missing kernel"),
        ("bf16", {"kernel": np.zeros(10**5, np.uint16)}, "'kernel' is uint16"),
        ("int8", {"bias": None, "bias#q": np.zeros(7, np.int8)}, "missing bias"),
        (
            "int8",
            {"bias": None, "bias#q": np.zeros(7, np.int8), "bias#scale": np.zeros(9, np.float32)},
            "'bias#scale' is float32 (9,); expected float32 (1,)",
        ),
        (
            "topk",
            {
                "bias": None,
                "bias#index": np.zeros(8, np.int32),
                "bias#value": np.zeros(8, np.float32),
            },
            "expected int32 (7,) or shorter",
        ),
        (
            "topk",
            {
                "bias": None,
                "bias#index": np.zeros(2, np.int32),
                "bias#value": np.zeros(3, np.float32),
            },
            "'bias#value' is float32 (3,)",
        ),
    ],
)
@pytest.mark.usefixtures("small_parts")
def test_an_announcement_that_does_not_match_the_model_is_refused(encoding, change, reason):
    learnt = {**delta(MODEL, MODEL), **change}
    tensors = {name: tensor for name, tensor in learnt.items() if tensor is not None}
    with pytest.raises(MalformedMessage) as caught:
        check_announced(announcement(tensors, encoding), MODEL)
    assert reason in str(caught.value)
    assert caught.value.cause == "tensors"


@pytest.mark.parametrize(
    ("offset", "nbytes", "reason"),
    [
        (0, 8 * 2**30, "has 8589934592 bytes, but its tensors end at byte 8"),
        (2**32, 2**32 + 8, "its tensors need at most"),
        (4, 12, "wrong offset"),
    ],
)
def test_a_transfer_larger_than_its_tensors_is_refused(offset, nbytes, reason):
    table = (TensorEntry("w", "float32", (2,), offset, 8),)
    transfer = Transfer(id="t", parts=1, nbytes=nbytes, digest="0" * 64)
    message = update(tensors=table, transfer=transfer)
    with pytest.raises(MalformedMessage, match=reason):
        check_announced(message, None)


class Untouched:
    """A link that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the link was used: {name}")


@pytest.mark.parametrize("first", [False, True])
async def test_no_part_is_fetched_of_an_update_that_does_not_match_the_model(tmp_path, first):
    events: list[ev.Event] = []
    settings = CoordinatorSettings("f", rs.Rules(rounds=1))
    committer = Committer(
        RunStore(tmp_path / "run"),
        settings,
        metadata=lambda _: {},
        record=lambda _: None,
        post=events.append,
    )
    aggregator = Aggregator(
        Fetcher(TOPOLOGY, settings, link=Untouched),  # type: ignore[arg-type]
        Saved("r", weights=None if first else MODEL),
        committer,
        settings,
        post=events.append,
    )
    table = (TensorEntry("w", "float32", (2**30,), 0, 2**32),)
    transfer = Transfer(id="t", parts=2048 if first else 1024, nbytes=2**33 if first else 2**32,
                        digest="0" * 64)  # fmt: skip
    if first:
        of = {"federation": "f", "run": "r", "worker": "w"}
        message = FirstWeights(**of, tensors=table, transfer=transfer)
        aggregator.take_first(Held(Delivered(1), message, memoryview(b"")))
    else:
        held = Held(Delivered(1), update(tensors=table, transfer=transfer), memoryview(b""))
        aggregator.fold(held, fx.Fold(held.arrived(0.0, rs.Handle(1, 1))), 1)
    running = asyncio.ensure_future(aggregator.run())
    await aggregator.drained()
    running.cancel()
    (event,) = events
    if first:
        assert isinstance(event, ev.Failed)
        assert "the announced transfer has 8589934592 bytes" in event.reason
    else:
        assert isinstance(event, ev.FoldFailed)
        assert (event.cause, event.again) == ("tensors", False)
        assert "missing bias, counts, kernel" in event.reason


# --- parts ---------------------------------------------------------------------------------------


@pytest.fixture
async def link() -> MemoryLink:
    opened = await MemoryBroker().open()
    await opened.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w")])
    return opened


class As:
    """A link that publishes everything as one broker user."""

    def __init__(self, link: MemoryLink, user: str) -> None:
        self._link, self._user = link, user

    async def publish(self, body: Any, properties: Properties, **where: Any) -> None:
        await self._link.publish(body, properties._replace(user=self._user), **where)


async def send_as(link: MemoryLink, user: str) -> Update:
    """Send an update in parts; return its announcement."""
    to = TOPOLOGY.results
    weights = {"w": np.arange(40.0)}
    await send_tensors(
        As(link, user), update(), weights, Route(to, ["update.w"]), parts=Route(to, ["part.w"])
    )
    message, _ = decode((await link.get(TOPOLOGY.updates)).body)
    assert isinstance(message, Update)
    return message


@pytest.mark.usefixtures("small_parts")
async def test_parts_of_another_user_are_ignored(link):
    transfer = (await send_as(link, "w")).transfer
    payload = np.arange(40.0).tobytes()
    mine = [await link.get(TOPOLOGY.outbox("w")) for _ in range(transfer.parts)]
    about = {"exchange": "", "keys": [TOPOLOGY.outbox("w")]}
    for number, delivery in enumerate(mine):  # a part of another user before each of ours
        false = Part(federation="f", transfer=transfer.id, part=number)
        body = wire.encode(false, bytes(len(decode(delivery.body)[1])))
        await link.publish(body, Properties(user="mallory"), **about)
        await link.publish(delivery.body, delivery.properties, **about)
        delivery.ack()
    outbox = TOPOLOGY.outbox("w")
    into = Assembly(transfer)
    await fetch(link, outbox, into, TOPOLOGY.rejected, user="w")
    assert into.payload() == payload
    for _ in range(transfer.parts):
        rejected = await link.get(TOPOLOGY.rejected)
        assert rejected.properties.headers["cause"] == "sender"
        assert "the user mallory sent it" in rejected.properties.headers["reason"]


@pytest.mark.usefixtures("small_parts")
async def test_replaced_parts_are_detected_without_verified_users(link):
    transfer = (await send_as(link, "w")).transfer
    first = await link.get(TOPOLOGY.outbox("w"))
    false = Part(federation="f", transfer=transfer.id, part=0)
    about = {"exchange": "", "keys": [TOPOLOGY.outbox("w")]}
    await link.publish(wire.encode(false, bytes(64)), Properties(), **about)
    first.ack()
    into = Assembly(transfer)
    await fetch(link, TOPOLOGY.outbox("w"), into, TOPOLOGY.rejected)
    with pytest.raises(MalformedMessage, match="replaced or damaged") as caught:
        into.payload()
    assert caught.value.cause == "tensors"


@pytest.mark.usefixtures("small_parts")
async def test_parts_of_another_user_alone_count_as_missing(link):
    transfer = (await send_as(link, "mallory")).transfer
    with pytest.raises(PartsGone):
        await fetch(link, TOPOLOGY.outbox("w"), Assembly(transfer), TOPOLOGY.rejected, user="w")
    assert (await link.counts(TOPOLOGY.rejected)).ready == transfer.parts


@pytest.mark.usefixtures("small_parts")
async def test_a_part_that_cannot_even_be_rejected_does_not_end_the_run(link):
    transfer = (await send_as(link, "w")).transfer
    await link.publish(b"garbage", Properties(), exchange="", keys=[TOPOLOGY.outbox("w")])
    first = [await link.get(TOPOLOGY.outbox("w")) for _ in range(transfer.parts)]
    for part in reversed(first):  # the garbage comes first
        await link.publish(part.body, Properties(), exchange="", keys=[TOPOLOGY.outbox("w")])
        part.ack()
    into = Assembly(transfer)
    await fetch(link, TOPOLOGY.outbox("w"), into, "deleted")
    assert into.payload() == np.arange(40.0).tobytes()
    assert await link.get(TOPOLOGY.outbox("w")) is None


@pytest.mark.usefixtures("small_parts")
async def test_a_cancelled_fetch_keeps_no_part(link):
    transfer = (await send_as(link, "w")).transfer
    (announcement,) = link.unacked
    entered, leave = threading.Event(), threading.Event()

    class Slow(Assembly):
        def add(self, part: Part, payload: memoryview) -> None:
            entered.set()
            leave.wait()
            super().add(part, payload)

    fetching = asyncio.ensure_future(
        fetch(link, TOPOLOGY.outbox("w"), Slow(transfer), TOPOLOGY.rejected)
    )
    await asyncio.to_thread(entered.wait)
    fetching.cancel()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert link.unacked == [announcement]
    assert (await link.counts(TOPOLOGY.outbox("w"))).ready == transfer.parts - 1


async def test_progress_counts_the_parts_that_are_confirmed():
    confirms = deque[asyncio.Future[None]]()

    class Slow:
        """A link that confirms parts when the test says so."""

        async def publish(self, _: bytes, about: Properties, **__: Any) -> None:
            if about.type == "part":
                confirms.append(asyncio.get_running_loop().create_future())
                await confirms[-1]

    seen: list[int] = []
    to = Route(TOPOLOGY.results, ["part.w"])
    sending = asyncio.ensure_future(
        send_tensors(
            Slow(),  # type: ignore[arg-type]
            update(),
            {"w": np.zeros(6 * 2**20, np.uint8)},
            to,
            parts=to,
            progress=lambda done, _: seen.append(done),
        )
    )
    while len(confirms) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    for confirm in reversed(confirms):
        confirm.set_result(None)
        await asyncio.sleep(0)
    await sending
    assert seen == [1, 2]


# --- rejected messages ---------------------------------------------------------------------------


async def test_large_garbage_is_truncated_and_cannot_be_requeued(link):
    garbage = b"\x92" + bytes(10**6)
    await link.publish(garbage, Properties(), exchange="", keys=[TOPOLOGY.updates])
    wrong = MalformedMessage("expected the header to be a map, but its type is int")
    await reject(link, await link.get(TOPOLOGY.updates), wrong, TOPOLOGY.rejected)
    (result,) = await requeue(await link._broker.open(), TOPOLOGY, [1])
    assert result.left == "only the first 65536 bytes of the message were kept"
    rejected = await link.get(TOPOLOGY.rejected)
    assert rejected.body == garbage[: 2**16]
    assert rejected.properties.headers["cut_from_bytes"] == len(garbage)


async def test_a_rejected_valid_message_is_stored_whole(link):
    body = wire.encode(update(), bytes(10**6))
    await link.publish(body, Properties(), exchange="", keys=[TOPOLOGY.updates])
    wrong = MalformedMessage("the message belongs to run other", "run")
    await reject(link, await link.get(TOPOLOGY.updates), wrong, TOPOLOGY.rejected)
    assert (await link.get(TOPOLOGY.rejected)).body == body


# --- updates that wait to be folded --------------------------------------------------------------


class Delivered:
    """A delivery with a body of the given size."""

    def __init__(self, size_bytes: int) -> None:
        self.body, self.released = bytes(size_bytes), False

    def release(self) -> None:
        self.released = True

    def ack(self) -> None:
        pass


def test_parked_deliveries_are_returned_when_there_is_room():
    room, of = Room(100), update()
    held = []
    for size_bytes in (60, 40):
        delivery = Delivered(size_bytes)
        assert not room.park(delivery)
        held.append(Held(delivery, of, memoryview(delivery.body), room))
    waiting = [Delivered(30), Delivered(50), Delivered(10)]
    assert all(room.park(delivery) for delivery in waiting)
    assert [len(delivery.body) for delivery in waiting] == [0, 0, 0]
    held[1].forget()  # 40 are free
    assert [delivery.released for delivery in waiting] == [True, False, False]
    held[1].free()  # a second call changes nothing
    assert room.used_bytes == 60
    held[0].forget()
    assert all(delivery.released for delivery in waiting)


def test_a_delivery_larger_than_the_room_is_held_alone():
    room = Room(100)
    delivery = Delivered(500)
    assert not room.park(delivery)
    held = Held(delivery, update(), memoryview(delivery.body), room)
    large = Delivered(400)
    assert room.park(large)
    held.free()
    assert large.released


def test_deliveries_parked_on_a_lost_link_are_dropped():
    room = Room(100)
    held = Held(Delivered(90), update(), memoryview(b""), room)
    parked = Delivered(90)
    assert room.park(parked)
    room.link_lost()
    held.free()
    assert not parked.released


# --- presence messages and their answers ---------------------------------------------------------

ABOUT = {"federation": "f", "worker": "w", "num_examples": 1, "heartbeat_s": 2.0, "task": "t"}


def hello(session: str = "s", **changes: Any) -> Hello:
    return Hello(**{**ABOUT, "session": session, **changes})


def test_endless_hellos_are_answered_a_few_times():
    hellos = HelloLimiter()
    assert [hellos.admit(hello(), 0.0) for _ in range(60)] == [True] * 4 + [False] * 56
    assert hellos.admit(hello(), 6.0)


def test_endless_restarts_are_answered_a_few_times():
    hellos = HelloLimiter()
    admitted = [hellos.admit(hello(str(number)), 0.0) for number in range(60)]
    assert admitted == [True] * 4 + [False] * 56
    beat = Heartbeat(**{**ABOUT, "session": "new"})
    assert not hellos.admit(beat, 1.0)  # it would be answered like a hello
    assert hellos.admit(beat, 6.0)
    assert hellos.admit(hello("other", worker="v"), 0.0)


def test_a_bye_and_a_heartbeat_are_not_answered_like_a_hello():
    hellos = HelloLimiter()
    hellos.admit(hello(), 0.0)
    hellos.left("w", "another")
    beat = Heartbeat(**{**ABOUT, "session": "s"})
    assert hellos.admit(beat, 0.1)
    hellos.left("w", "s")
    assert not hellos.admit(beat, 0.2)  # it would be sent its work again, a whole model
    assert [hellos.admit(hello(), 0.3) for _ in range(5)] == [True] * 3 + [False] * 2
    assert hellos.admit(beat, 0.3)
    assert hellos.admit(hello("next"), 60.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "t" * 201),
        ("classes", ["c" * 100] * 400),
        ("classes", [""] * 5001),
        ("classes", ["é" * 90] * 200),
    ],
)
def test_the_size_of_presence_messages_is_bounded(field, value):
    header = {"protocol": 2, "kind": "hello", **ABOUT, "session": "s", field: value}
    with pytest.raises(MalformedMessage, match=field):
        decode(b"\x92" + wire.msgpack.packb(header) + b"\xc4\x00")


@pytest.mark.parametrize("field", ["classes", "critical", "features", "frozen", "protocols"])
def test_validation_ends_at_the_first_of_many_invalid_items(field):
    # To report all 60,000 takes the event loop a third of a second.
    header = {"protocol": 2, "kind": "hello", **ABOUT, "session": "s", field: [None] * 60_000}
    with pytest.raises(ValidationError) as caught:
        parsing._adapter.validate_python(header)
    assert caught.value.error_count() <= 2  # fewer items than the minimum may be left


async def test_a_refusal_is_sent_once_per_session_and_again_if_sending_failed(link):
    links = [None, link]
    settings = CoordinatorSettings("f", rs.Rules(rounds=1))

    async def a_link() -> MemoryLink:
        return links[0]

    outgoing = Outbox(
        TOPOLOGY, "r", settings, link=lambda: links[0], a_link=a_link, record=lambda _: None
    )
    running = asyncio.ensure_future(outgoing.run())
    state: Any = SimpleNamespace()
    for session in ("s", "s"):
        outgoing.perform(fx.Refuse("w", session, "x" * 5000, "model"), state, None)
    await outgoing.drained()
    links[0] = link
    for session in ("s", "s", "s", "t"):
        outgoing.perform(fx.Refuse("w", session, "x" * 5000, "model"), state, None)
    await outgoing.drained()
    running.cancel()
    sent = [decode((await link.get(TOPOLOGY.inbox("w"))).body)[0] for _ in range(2)]
    assert [one.session for one in sent] == ["s", "t"]
    assert all(len(one.reason) == 1000 for one in sent)
    assert await link.get(TOPOLOGY.inbox("w")) is None


async def test_messages_that_cannot_be_rejected_do_not_use_up_the_prefetch():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare(TOPOLOGY.shared())
    broker.delete(TOPOLOGY.rejected)

    async def a_link() -> MemoryLink:
        return link

    outgoing = Outbox(
        TOPOLOGY,
        "r",
        CoordinatorSettings("f", rs.Rules(rounds=1)),
        link=lambda: link,
        a_link=a_link,
        record=lambda _: None,
    )
    running = asyncio.ensure_future(outgoing.run())
    deliveries = await link.consume(TOPOLOGY.presence, prefetch=2)
    for _ in range(5):
        await link.publish(b"garbage", Properties(), exchange="", keys=[TOPOLOGY.presence])
        async with asyncio.timeout(60):
            outgoing.reject(await anext(deliveries), MalformedMessage("it is garbage"))
            await outgoing.drained()
    assert link.unacked == []
    running.cancel()


# --- headers -------------------------------------------------------------------------------------


def test_no_more_of_a_header_is_read_than_its_limit():
    huge = b"\x92" + wire.msgpack.packb({"kind": "hello", "x": b"y" * 30_000_000}) + b"\xc4\x00"
    for most in (wire.SMALL_HEADER_BYTES, wire.MAX_HEADER_BYTES):
        with pytest.raises(MalformedMessage, match=f"more than {most} bytes"):
            decode(huge, max_header=most)


@pytest.mark.parametrize("encoding", [None, "int8"])
def test_the_header_of_every_update_of_a_model_fits(encoding):
    names = [f"block_{number}/{'x' * 300}/kernel" for number in range(300)]
    model = {name: np.zeros((1024, 1), np.float32) for name in names}
    room = wire.header_room((name, tensor.shape) for name, tensor in model.items())
    tensors = compress(model, encoding, {})[0] if encoding else model
    metrics = {f"{'é' * 60}{number}": 0.1 for number in range(64)}
    sent = update(encoding=encoding, metrics=metrics)
    body = wire.encode(sent, table=wire.lay_out(tensors)[0])
    assert len(body) < room < 2**19
    decode(body, max_header=room)
