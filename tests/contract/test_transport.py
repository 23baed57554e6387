"""The transport contract, tested against the in-memory broker and a real RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import aiormq
import numpy as np
import pytest
from aiormq.exceptions import ChannelLockedResource, ChannelNotFoundEntity

from fluffle_common.concurrency import run_all
from fluffle_common.errors import BrokerError, LinkLost, MalformedMessage, UsageError
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.topology import Binding, Exchange, Queue, Topology, locks_of
from fluffle_common.protocol.transfer_parts import Assembly, digest_of
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.base import (
    MAX_LISTED_KEYS,
    Delivery,
    Link,
    OtherArguments,
    Properties,
    QueueFull,
    QueueInUse,
    Transport,
    Unroutable,
)
from fluffle_common.transport.fetch_parts import PartsGone, fetch
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.messaging import Route, reject, send_ahead, send_tensors
from fluffle_common.transport.rabbitmq.channel import ContentChannel
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from fluffle_common.transport.reconnect import Backoff, reconnecting

# How long a step may take before the test counts as hanging.
PATIENCE_S = 60.0


class Proxy:
    """A TCP proxy to the broker that can hold back data or cut connections abruptly."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows: list[asyncio.Event] = []  # one for each connection

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def hold(self, *connections: int) -> None:
        """Hold back data in both directions on these connections, or on all."""
        for number, flows in enumerate(self._flows):
            if not connections or number in connections:
                flows.clear()

    def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        self._writers += [writer, back]
        flows = asyncio.Event()
        flows.set()
        self._flows.append(flows)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, sink, flows))
            self._tasks.add(task)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, flows: asyncio.Event
    ) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(2**16):
                    await flows.wait()
                    sink.write(data)
                    await sink.drain()
        finally:
            sink.close()


class Bench:
    """A broker, in memory or real, with its own federation and links that can be cut."""

    def __init__(self, url: str | None) -> None:
        self.url = url
        self.memory = MemoryBroker()
        self.names = Topology(f"t{uuid.uuid4().hex[:12]}")
        self._links: list[Link] = []
        self._proxies: dict[Link, Proxy] = {}

    @property
    def real(self) -> bool:
        return self.url is not None

    async def open(self) -> Link:
        if self.url is None:
            link: Link = await self.memory.open()
        else:
            split = urlsplit(self.url)
            proxy = Proxy(split.hostname or "", split.port or 0)
            port = await proxy.start()
            url = self.url.replace(f":{split.port}", f":{port}")
            link = await AmqpTransport(url, "contract test").open()
            self._proxies[link] = proxy
        self._links.append(link)
        return link

    def proxy(self, link: Link) -> Proxy:
        return self._proxies[link]

    def cut(self, link: Link) -> None:
        """Lose a link abruptly, like a pulled cable or a killed process."""
        if isinstance(link, MemoryLink):
            link.cut()
        else:
            self._proxies[link].cut()

    async def queue(self, link: Link, name: str = "q", **arguments: str | int | bool) -> str:
        """Declare a queue of this federation and return its full name."""
        full = f"{self.names.federation}.{name}"
        dashed = {key.replace("_", "-"): value for key, value in arguments.items()}
        await link.declare([Queue(full, "of a test", dashed)])
        return full

    async def settled(self, link: Link) -> None:
        """Return when the broker has processed everything that this link sent, acks included.

        A round trip on the same connection guarantees that.
        """
        spare = await self.queue(link, "spare")
        assert await link.get(spare) is None

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        for proxy in self._proxies.values():
            await proxy.close()


@pytest.fixture(params=["memory", pytest.param("rabbit", marks=pytest.mark.rabbit)])
def broker_under_test(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("rabbit_url") if request.param == "rabbit" else None


@pytest.fixture
async def bench(broker_under_test: str | None) -> AsyncIterator[Bench]:
    opened = Bench(broker_under_test)
    yield opened
    await opened.close()


@pytest.fixture
async def real(rabbit_url: str) -> AsyncIterator[Bench]:
    opened = Bench(rabbit_url)
    yield opened
    await opened.close()


async def soon(work: Awaitable[Any]) -> Any:
    """Await something with a time limit, so that the test fails instead of hanging."""
    return await asyncio.wait_for(work, PATIENCE_S)


async def put(link: Link, queue: str, *bodies: bytes, durable: bool = True) -> None:
    for body in bodies:
        await soon(
            link.publish(body, Properties(type="t", durable=durable), exchange="", keys=[queue])
        )


async def take(deliveries: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    return [await soon(anext(deliveries)) for _ in range(count)]


async def drain(link: Link, queue: str) -> list[bytes]:
    """Get and acknowledge all ready messages; return their bodies."""
    ready = []
    while (delivery := await soon(link.get(queue))) is not None:
        ready.append(delivery.body)
        delivery.ack()
    return ready


async def consume_when_free(link: Link, queue: str) -> AsyncIterator[Delivery]:
    while True:
        try:
            return await link.consume(queue, prefetch=5, exclusive=True)
        except QueueInUse:  # the broker does not announce that a consumer is gone
            await asyncio.sleep(0.01)


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.body for delivery in deliveries]


def numbered(count: int) -> list[bytes]:
    return [b"m%d" % number for number in range(count)]


# --- declaring ---------------------------------------------------------------------------------


async def test_declaring_again_changes_nothing(bench):
    one, two = await bench.open(), await bench.open()
    entities = [*bench.names.shared(), *bench.names.of_worker("w1")]
    await one.declare(entities)
    inbox = bench.names.inbox("w1")
    await one.publish(b"kept", Properties(), exchange=bench.names.work, keys=["w1"])
    await one.declare(entities)
    await two.declare(entities)
    await two.publish(b"once", Properties(), exchange=bench.names.work, keys=["w1"])
    assert await drain(two, inbox) == [b"kept", b"once"]


async def test_declaring_a_queue_with_different_arguments_names_the_remedy(bench):
    link = await bench.open()
    await bench.queue(link, "q", x_max_length=5)
    with pytest.raises(OtherArguments, match="already exists with different arguments.*delete"):
        await bench.queue(link, "q", x_max_length=6)
    link = await bench.open()
    remedy = "the same --queue-type for the" if bench.real else "delete it"
    with pytest.raises(OtherArguments, match=remedy):
        await bench.queue(link, "q", x_max_length=5, x_queue_type="quorum")


# --- publishing --------------------------------------------------------------------------------


async def test_messages_are_consumed_in_the_order_of_publishing(bench):
    sender, receiver = await bench.open(), await bench.open()
    queue = await bench.queue(sender)
    await put(sender, queue, *numbered(3))
    deliveries = await receiver.consume(queue, prefetch=50)
    await put(sender, queue, *[b"later %d" % n for n in range(3)])
    got = await take(deliveries, 6)
    assert bodies(got) == [b"m0", b"m1", b"m2", b"later 0", b"later 1", b"later 2"]
    assert not any(delivery.redelivered for delivery in got)


@pytest.mark.parametrize("size", [0, 1, 2**14 - 1, 2**14, 300_000, 2**22 + 1000])
async def test_bodies_of_every_size_arrive_whole(bench, size):
    link = await bench.open()
    queue = await bench.queue(link)
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    await put(link, queue, body)
    delivery = await soon(link.get(queue))
    assert memoryview(delivery.body).readonly
    assert delivery.body == body


async def test_headers_and_properties_arrive_unchanged(bench):
    link = await bench.open()
    await link.declare([*bench.names.shared(), *bench.names.of_worker("a")])
    headers = {"round": 7, "worker": "w-ä", "loss": 0.25, "late": True, "big": 10**12, "neg": -3}
    for durable in (True, False):
        sent = Properties("fit", "fit/run/7", headers, durable)
        await link.publish(b"x", sent, exchange=bench.names.work, keys=["a", "b"])
        got = (await soon(link.get(bench.names.inbox("a")))).properties
        assert (got.type, got.message_id, got.durable) == ("fit", "fit/run/7", durable)
        assert dict(got.headers) == headers
        assert {key: type(value) for key, value in got.headers.items()} == {
            key: type(value) for key, value in headers.items()
        }
        assert got.user == ("guest" if bench.real else None)
    await link.publish(b"x", Properties(), exchange=bench.names.work, keys=["a"])
    bare = (await soon(link.get(bench.names.inbox("a")))).properties
    assert (bare.type, dict(bare.headers), bare.durable) == ("", {}, True)


async def test_one_publish_with_several_keys_reaches_each_inbox_once(bench):
    link = await bench.open()
    await link.declare(bench.names.shared())
    for worker in ("a", "b.1", "c", "d"):
        await link.declare(bench.names.of_worker(worker))
    # A repeated key and an unknown one make no difference.
    keys = ["b.1", "a", "b.1", "nobody", "c"]
    await link.publish(b"work", Properties(), exchange=bench.names.work, keys=keys)
    got = {w: await drain(link, bench.names.inbox(w)) for w in ("a", "b.1", "c", "d")}
    assert got == {"a": [b"work"], "b.1": [b"work"], "c": [b"work"], "d": []}


async def test_a_message_to_many_lists_only_the_first_recipient(bench):
    link = await bench.open()
    await link.declare(bench.names.shared())
    workers = [f"w{number}" for number in range(MAX_LISTED_KEYS + 1)]
    for worker in workers:
        await link.declare(bench.names.of_worker(worker))
    for keys in (workers, workers[:-1]):
        await link.publish(b"work", Properties(), exchange=bench.names.work, keys=keys)
    last_but_one = [await link.get(bench.names.inbox(workers[-2])) for _ in range(2)]
    assert [delivery.keys for delivery in last_but_one] == [("w0",), tuple(workers[:-1])]
    assert await drain(link, bench.names.inbox(workers[-1])) == [b"work"]


@pytest.mark.parametrize("bound", [0, -1])
async def test_a_message_may_have_more_keys_than_fit_into_a_frame(bench, bound):
    link = await bench.open()
    exchange, keys = bench.names.work, [f"{number:060}" for number in range(2500)]
    await link.declare([Exchange(exchange, "direct")])
    about = Properties(type="fit")
    with pytest.raises(Unroutable):
        await soon(link.publish(b"x", about, exchange=exchange, keys=keys))
    queue, full = (
        await bench.queue(link),
        await bench.queue(link, "full", x_max_length=1, x_overflow="reject-publish"),
    )
    await link.declare([Binding(queue, exchange, keys[bound])])
    await soon(link.publish(b"x", about, exchange=exchange, keys=keys))
    assert await drain(link, queue) == [b"x"]
    await link.declare([Binding(full, exchange, keys[1])])
    with pytest.raises(QueueFull, match=r"is full$|refused the fit for (\d+, ){5}…$"):
        for body in numbered(50):
            await soon(link.publish(body, about, exchange=exchange, keys=keys))
    assert len(await drain(link, queue)) > 1


async def test_two_keys_of_one_queue_deliver_one_message(bench):
    link = await bench.open()
    queue = await bench.queue(link)
    exchange = f"{bench.names.federation}.e"
    await link.declare(
        [
            Exchange(exchange, "direct"),
            Binding(queue, exchange, "one"),
            Binding(queue, exchange, "two"),
        ]
    )
    await link.publish(b"x", Properties(), exchange=exchange, keys=["one", "two"])
    assert await drain(link, queue) == [b"x"]


@pytest.mark.parametrize("keys", [["nobody"], ["nobody", "no one"]])
async def test_a_message_without_a_bound_queue_is_unroutable(bench, keys):
    link = await bench.open()
    await link.declare([*bench.names.shared(), *bench.names.of_worker("a")])
    with pytest.raises(Unroutable):
        await link.publish(b"x", Properties(), exchange=bench.names.work, keys=keys)
    with pytest.raises(Unroutable):
        await link.publish(b"x", Properties(), exchange="", keys=keys)
    # The link still works.
    await link.publish(b"y", Properties(), exchange=bench.names.work, keys=["a"])
    assert await drain(link, bench.names.inbox("a")) == [b"y"]


async def test_results_are_routed_by_kind_and_unknown_kinds_to_unrouted(bench):
    link = await bench.open()
    names = bench.names
    await link.declare([*names.shared(), *names.of_worker("w.1"), *names.of_worker("w")])

    async def send(key: str) -> None:
        await link.publish(key.encode(), Properties(), exchange=names.results, keys=[key])

    for key in (
        *("update.w.1", "evaluation.w", "first_weights.w", "hello.w.1", "heartbeat.w", "bye.w"),
        *("failure.w", "exchange.w", "part.w.1", "part.w", "updates.w", "nonsense", "part.w.2"),
    ):
        await send(key)
    assert await drain(link, names.updates) == [
        b"update.w.1",
        b"evaluation.w",
        b"first_weights.w",
        b"exchange.w",
    ]
    assert await drain(link, names.presence) == [
        b"hello.w.1",
        b"heartbeat.w",
        b"bye.w",
        b"failure.w",
    ]
    assert await drain(link, names.outbox("w.1")) == [b"part.w.1"]
    assert await drain(link, names.outbox("w")) == [b"part.w"]
    assert await drain(link, names.unrouted) == [b"updates.w", b"nonsense", b"part.w.2"]


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [{"x_max_length": 2}, {"x_max_length_bytes": 5}])
async def test_a_full_queue_refuses_messages_and_loses_none(bench, bound):
    link = await bench.open()
    queue = await bench.queue(link, "q", x_overflow="reject-publish", **bound)
    await put(link, queue, b"m0", b"m1")
    for _ in range(2):
        with pytest.raises(QueueFull):
            await put(link, queue, b"m2")
    first = await soon(link.get(queue))
    assert first.body == b"m0"
    await put(link, queue, b"m3")  # unacknowledged messages do not count
    first.ack()
    assert await drain(link, queue) == [b"m1", b"m3"]


async def test_a_full_queue_does_not_affect_other_queues(bench):
    link = await bench.open()
    exchange = f"{bench.names.federation}.e"
    full = [
        await bench.queue(link, name, x_overflow="reject-publish", x_max_length=1)
        for name in ("a", "c")
    ]
    roomy = await bench.queue(link, "b")
    await link.declare([Exchange(exchange, "fanout")])
    await link.declare([Binding(name, exchange, "") for name in (*full, roomy)])
    for name in full:
        await put(link, name, b"in the way")
    with pytest.raises(QueueFull):
        await link.publish(b"x", Properties(), exchange=exchange, keys=[""])
    assert await drain(link, roomy) == [b"x"]
    for name in full:
        assert await drain(link, name) == [b"in the way"]


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_receiver_that_refuses_does_not_keep_a_model_from_the_others(
    bench, monkeypatch, ahead
):
    """Regression: a worker that declared its inbox like this kept the whole run from its work."""
    monkeypatch.setattr("fluffle_common.protocol.wire_format.PART_BYTES", 64)
    link = await bench.open()
    exchange, sound = f"{bench.names.federation}.e", await bench.queue(link, "a")
    refusing = await bench.queue(link, "b", x_overflow="reject-publish", x_max_length=0)
    bindings = [Binding(sound, exchange, "a"), Binding(refusing, exchange, "b")]
    await link.declare([Exchange(exchange, "direct"), *bindings])
    of = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": "w"}
    message = Update(**of, num_examples=1, seconds=0.0)
    weights, route = {"w": np.arange(80.0)}, Route(exchange, ["a", "b"])
    if ahead:
        digest = asyncio.to_thread(digest_of, weights)
        sending = (await soon(send_ahead(link, message, weights, route, digest=digest)))()
    else:
        sending = send_tensors(link, message, weights, route)
    with pytest.raises(QueueFull):
        await soon(sending)
    announced, _ = decode((await soon(link.get(sound))).body)
    into = Assembly(announced.transfer)
    await soon(fetch(link, sound, into, "rejected"))
    assert into.payload() == weights["w"].tobytes()


@pytest.mark.parametrize("bound", [{"x_max_length": 3}, {"x_max_length_bytes": 6}])
async def test_a_bounded_queue_drops_the_oldest(bench, bound):
    link = await bench.open()
    queue = await bench.queue(link, "q", x_overflow="drop-head", **bound)
    await put(link, queue, *numbered(5))
    assert await drain(link, queue) == [b"m2", b"m3", b"m4"]


# --- consuming ---------------------------------------------------------------------------------


async def test_get_takes_one_message_or_returns_none(bench):
    link = await bench.open()
    queue = await bench.queue(link)
    assert await soon(link.get(queue)) is None
    await put(link, queue, b"m0", b"m1")
    first, second = await soon(link.get(queue)), await soon(link.get(queue))
    assert (first.body, second.body) == (b"m0", b"m1")
    assert await soon(link.get(queue)) is None
    first.ack()
    second.ack()


async def test_purge_drops_only_ready_messages(bench):
    link = await bench.open()
    queue = await bench.queue(link)
    assert await soon(link.purge(queue)) == 0
    await put(link, queue, *numbered(4))
    held = await soon(link.get(queue))
    assert await soon(link.purge(queue)) == 3
    assert await soon(link.get(queue)) is None
    held.release()
    await bench.settled(link)
    assert await drain(link, queue) == [b"m0"]


async def test_unacknowledged_gets_return_to_the_queue_when_the_link_is_lost(bench):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    await put(one, queue, b"acked", b"held")
    acked, _held = await soon(one.get(queue)), await soon(one.get(queue))
    acked.ack()
    await bench.settled(one)
    deliveries = await two.consume(queue, prefetch=5)
    bench.cut(one)
    (again,) = await take(deliveries, 1)
    assert (again.body, again.redelivered) == (b"held", True)


async def test_prefetch_limits_unacknowledged_deliveries_and_an_ack_makes_room(bench):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    deliveries = await one.consume(queue, prefetch=2)
    await put(one, queue, *numbered(5))
    first, second = await take(deliveries, 2)
    assert bodies([first, second]) == [b"m0", b"m1"]
    waiting = asyncio.ensure_future(anext(deliveries))
    # The third is still in the queue, where another consumer can get it.
    third = await soon(two.get(queue))
    assert third.body == b"m2"
    assert not waiting.done()
    second.ack()
    fourth = await soon(waiting)
    assert fourth.body == b"m3"
    fifth = await soon(two.get(queue))
    assert fifth.body == b"m4"
    first.ack()
    await put(one, queue, b"m5")
    assert bodies(await take(deliveries, 1)) == [b"m5"]


async def test_a_released_message_returns_to_the_head_as_redelivered(bench):
    link = await bench.open()
    queue = await bench.queue(link)
    await put(link, queue, *numbered(3))
    deliveries = await link.consume(queue, prefetch=1)
    (first,) = await take(deliveries, 1)
    assert not first.redelivered
    first.release()
    (again,) = await take(deliveries, 1)
    assert (again.body, again.redelivered) == (b"m0", True)
    again.ack()
    (second,) = await take(deliveries, 1)
    assert (second.body, second.redelivered) == (b"m1", False)


async def test_competing_consumers_get_each_message_once(bench):
    one, two, sender = [await bench.open() for _ in range(3)]
    queue = await bench.queue(sender)
    seen: list[bytes] = []
    by: dict[str, int] = {"one": 0, "two": 0}
    every = asyncio.Event()

    async def reader(name: str, link: Link) -> None:
        async for delivery in await link.consume(queue, prefetch=1):
            seen.append(delivery.body)
            by[name] += 1
            delivery.ack()
            if len(seen) >= 30:
                every.set()

    tasks = [asyncio.create_task(reader(name, link)) for name, link in (("one", one), ("two", two))]
    await put(sender, queue, *numbered(30))
    await soon(every.wait())
    await bench.settled(one)
    await bench.settled(two)
    assert await soon(sender.get(queue)) is None
    for link in (one, two):
        bench.cut(link)
    ends = await soon(asyncio.gather(*tasks, return_exceptions=True))
    assert [type(end) for end in ends] == [LinkLost, LinkLost]
    assert sorted(seen) == sorted(numbered(30))


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
async def test_an_exclusive_consumer_and_another_consumer_exclude_each_other(bench, first, second):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    deliveries = await one.consume(queue, prefetch=5, exclusive=first)
    with pytest.raises(QueueInUse):
        await two.consume(queue, prefetch=5, exclusive=second)
    # Both links still work, and the first one still has the queue.
    await put(two, queue, b"x")
    assert bodies(await take(deliveries, 1)) == [b"x"]
    other = await bench.queue(two, "other")
    await put(one, other, b"y")
    assert bodies(await take(await two.consume(other, prefetch=1), 1)) == [b"y"]


async def test_a_lost_link_frees_its_exclusive_queue(bench):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    await put(one, queue, b"x")
    await take(await one.consume(queue, prefetch=5, exclusive=True), 1)
    bench.cut(one)
    deliveries = await soon(consume_when_free(two, queue))
    (again,) = await take(deliveries, 1)
    assert (again.body, again.redelivered) == (b"x", True)


async def test_a_standby_gets_nothing_until_the_first_consumer_is_lost(bench):
    one, two, sender = [await bench.open() for _ in range(3)]
    await sender.declare(bench.names.shared())
    queue = bench.names.updates
    active = await one.consume(queue, prefetch=2)
    standby = await two.consume(queue, prefetch=10)
    waiting = asyncio.ensure_future(anext(standby))
    await put(sender, queue, *numbered(4))
    first, _ = await take(active, 2)
    # Even when the first one is at its prefetch, the standby gets nothing.
    await bench.settled(two)
    assert not waiting.done()
    first.ack()
    assert bodies(await take(active, 1)) == [b"m2"]
    assert not waiting.done()
    bench.cut(one)
    got = [await soon(waiting), *await take(standby, 2)]
    assert bodies(got) == [b"m1", b"m2", b"m3"]
    assert [delivery.redelivered for delivery in got] == [True, True, False]


# --- losing the link ---------------------------------------------------------------------------


@pytest.mark.parametrize("waiting_before", [True, False])
async def test_unacknowledged_messages_are_redelivered_in_order(bench, waiting_before):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    await put(one, queue, *numbered(5))
    got = await take(await one.consume(queue, prefetch=10), 5)
    got[1].ack()
    await bench.settled(one)
    if waiting_before:
        deliveries = await two.consume(queue, prefetch=10)
        bench.cut(one)
    else:
        bench.cut(one)
        deliveries = await two.consume(queue, prefetch=10)
    again = await take(deliveries, 4)
    assert bodies(again) == [b"m0", b"m2", b"m3", b"m4"]
    assert all(delivery.redelivered for delivery in again)
    for delivery in again:
        delivery.ack()
    await bench.settled(two)
    assert await soon(two.get(queue)) is None


async def test_acknowledged_messages_are_never_redelivered(bench):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    await put(one, queue, b"done", b"open")
    done, _ = await take(await one.consume(queue, prefetch=10), 2)
    done.ack()  # the broker hears of it though nobody waits for that
    await one.close()
    deliveries = await two.consume(queue, prefetch=10)
    assert bodies(await take(deliveries, 1)) == [b"open"]
    await put(two, queue, b"end")
    assert bodies(await take(deliveries, 1)) == [b"end"]


async def test_closing_the_iterator_requeues_its_messages_and_keeps_the_link(bench):
    link = await bench.open()
    queue = await bench.queue(link)
    await put(link, queue, *numbered(5))
    deliveries = await link.consume(queue, prefetch=3, exclusive=True)
    first, _ = await take(deliveries, 2)
    first.ack()
    await bench.settled(link)
    await soon(deliveries.aclose())
    again = await link.consume(queue, prefetch=10, exclusive=True)
    assert bodies(await take(again, 4)) == numbered(5)[1:]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_messages_released_in_any_order_return_to_their_positions(bench, order):
    link = await bench.open()
    queue = await bench.queue(link)
    await put(link, queue, *numbered(5))
    held = [await soon(link.get(queue)) for _ in range(3)]
    for number in order:
        held[number].release()
    await bench.settled(link)
    assert await drain(link, queue) == numbered(5)


async def test_a_delivery_has_its_exchange_keys_and_time(bench):
    link = await bench.open()
    await link.declare([*bench.names.shared(), *bench.names.of_worker("a")])
    before = int(time.time())
    await link.publish(b"x", Properties(), exchange=bench.names.work, keys=["a", "b"])
    got = await soon(link.get(bench.names.inbox("a")))
    assert (got.queue, got.exchange) == (bench.names.inbox("a"), bench.names.work)
    assert got.keys == ("a", "b")
    assert before <= got.sent_at <= time.time()


async def test_acknowledging_twice_does_no_harm(bench):
    link = await bench.open()
    queue = await bench.queue(link)
    await put(link, queue, b"once", b"next")
    deliveries = await link.consume(queue, prefetch=1)
    (once,) = await take(deliveries, 1)
    once.ack()
    once.ack()
    once.release()
    (following,) = await take(deliveries, 1)
    following.ack()
    await bench.settled(link)
    assert await link.get(queue) is None


# --- streams -----------------------------------------------------------------------------------


async def stream(bench: Bench, link: Link, *bodies: bytes) -> str:
    """Declare a federation's stream and publish these bodies to it."""
    await link.declare(bench.names.shared())
    await put(link, bench.names.journal, *bodies)
    return bench.names.journal


def offsets(deliveries: list[Delivery]) -> list[int | None]:
    return [delivery.offset for delivery in deliveries]


async def test_a_stream_can_be_read_repeatedly_and_followed_live(bench):
    sender, reader = await bench.open(), await bench.open()
    journal = await stream(bench, sender, *numbered(3))
    first, second = await reader.follow(journal), await sender.follow(journal)
    for following in (first, second):
        got = await take(following, 3)
        assert bodies(got) == numbered(3)
        assert offsets(got) == [0, 1, 2]
        assert not any(delivery.redelivered for delivery in got)
    await put(sender, journal, b"live")
    for following in (first, second, await reader.follow(journal, since=3)):
        (live,) = await take(following, 1)
        assert (live.body, live.offset) == (b"live", 3)
        live.ack()  # not needed, and harmless


async def test_a_stream_longer_than_the_prefetch_is_read_in_order(bench):
    sender, reader = await bench.open(), await bench.open()
    journal = await stream(bench, sender)
    sent = numbered(1200)
    await soon(asyncio.gather(*(put(sender, journal, body) for body in sent)))
    assert (await soon(reader.newest(journal))).offset == 1199
    got = await take(await reader.follow(journal), 1200)
    assert sorted(bodies(got)) == sorted(sent)
    assert offsets(got) == list(range(1200))
    assert bodies(await take(await reader.follow(journal, since=700), 500)) == bodies(got)[700:]


async def test_a_stream_is_read_from_an_offset_or_a_time(bench):
    link = await bench.open()
    journal = await stream(bench, link, *numbered(4))
    assert offsets(await take(await link.follow(journal, since=2), 2)) == [2, 3]
    a_minute = timedelta(minutes=1)
    earlier = await link.follow(journal, since=datetime.now(UTC) - a_minute)
    assert offsets(await take(earlier, 4)) == [0, 1, 2, 3]
    later = await link.follow(journal, since=4)
    waiting = asyncio.ensure_future(anext(later))
    await bench.settled(link)
    assert not waiting.done()
    await put(link, journal, b"next")
    assert (await soon(waiting)).body == b"next"


async def test_newest_returns_the_last_entry(bench):
    sender, reader = await bench.open(), await bench.open()
    journal = await stream(bench, sender)
    assert await soon(reader.newest(journal)) is None
    for number in range(10):
        # Published together, so that the broker stores them in one chunk.
        await soon(asyncio.gather(*(put(sender, journal, b"x") for _ in range(number + 1))))
        last = await soon(reader.newest(journal))
        assert last.offset == (number + 1) * (number + 2) // 2 - 1
    assert offsets(await take(await reader.follow(journal), 55)) == list(range(55))


@pytest.mark.parametrize("how", ["cut", "close"])
async def test_reading_a_stream_continues_over_another_link(bench, how):
    sender, reader = await bench.open(), await bench.open()
    journal = await stream(bench, sender, *numbered(5))
    following = await reader.follow(journal)
    seen = offsets(await take(following, 5))
    waiting = asyncio.ensure_future(anext(following))
    await bench.settled(reader)
    bench.cut(reader) if how == "cut" else await reader.close()
    with pytest.raises(LinkLost):
        await soon(waiting)
    await put(sender, journal, b"meanwhile")
    again = await (await bench.open()).follow(journal, since=seen[-1] + 1)
    assert bodies(await take(again, 1)) == [b"meanwhile"]


@pytest.mark.parametrize("what", ["get", "purge"])
async def test_taking_from_a_stream_loses_the_link(bench, what):
    link, other = await bench.open(), await bench.open()
    journal = await stream(bench, link, b"kept")
    with pytest.raises(LinkLost):
        await soon(getattr(link, what)(journal))
    assert bodies(await take(await other.follow(journal), 1)) == [b"kept"]


async def test_a_bounded_stream_drops_the_oldest_and_keeps_its_offsets():
    broker = MemoryBroker()
    link = await broker.open()
    arguments = {"x-queue-type": "stream", "x-max-length-bytes": 3}
    await link.declare([Queue("s", "of a test", arguments)])
    await put(link, "s", *[b"x"] * 10)
    assert offsets(await take(await link.follow("s", since=2), 3)) == [7, 8, 9]
    broker.stop()
    broker.up = True
    assert (await (await broker.open()).newest("s")).offset == 9


# --- tapping -------------------------------------------------------------------------------------


async def tapped(
    bench: Bench, *bindings: tuple[str, str]
) -> tuple[Link, Queue, AsyncGenerator[Delivery]]:
    link, queue = await bench.open(), bench.names.tap(uuid.uuid4().hex)
    tap = await link.tap(queue, [Binding(queue.name, *each) for each in bindings])
    return link, queue, tap


async def test_a_tap_gets_a_copy_of_a_message(bench):
    link = await bench.open()
    await link.declare([*bench.names.shared(), *bench.names.of_worker("a")])
    results, work = bench.names.results, bench.names.work
    _, _, tap = await tapped(bench, (results, "update.#"), (work, "a"))
    await link.publish(b"u", Properties(type="update"), exchange=results, keys=["update.a"])
    await link.publish(b"f", Properties(type="fit"), exchange=work, keys=["b", "a"])
    copies = await take(tap, 2)
    assert [(copy.body, copy.exchange, copy.keys) for copy in copies] == [
        (b"u", results, ("update.a",)),
        (b"f", work, ("b", "a")),
    ]
    assert await drain(link, bench.names.updates) == [b"u"]
    assert await drain(link, bench.names.inbox("a")) == [b"f"]


async def test_a_tap_gets_one_copy_of_a_message_with_several_keys(bench):
    link = await bench.open()
    await link.declare([*bench.names.shared()])
    for worker in ("a", "b"):
        await link.declare(bench.names.of_worker(worker))
    work = bench.names.work
    _, _, tap = await tapped(bench, (work, "a"), (work, "b"))
    await link.publish(b"one", Properties(), exchange=work, keys=["a", "b"])
    await link.publish(b"two", Properties(), exchange=work, keys=["b"])
    assert bodies(await take(tap, 2)) == [b"one", b"two"]


async def test_bindings_of_a_tap_can_change_while_it_runs(bench):
    link = await bench.open()
    await link.declare([*bench.names.shared(), *bench.names.of_worker("a")])
    results = bench.names.results
    tapping, queue, tap = await tapped(bench, (results, "update.#"))

    async def publish(kind: str) -> None:
        keys = [f"{kind}.a"]
        await link.publish(kind.encode(), Properties(), exchange=results, keys=keys)

    await publish("hello")
    await tapping.declare([Binding(queue.name, results, "hello.#")])
    await publish("hello")
    await tapping.unbind(Binding(queue.name, results, "update.#"))
    await publish("update")
    await tapping.unbind(Binding(queue.name, results, "never.bound"))
    await publish("hello")
    assert bodies(await take(tap, 2)) == [b"hello", b"hello"]


@pytest.mark.parametrize("how", ["iterator", "close", "cut"])
async def test_a_tap_is_deleted_with_its_iterator_or_its_link(bench, how):
    link = await bench.open()
    await link.declare(bench.names.shared())
    work = bench.names.work
    tapping, queue, tap = await tapped(bench, (work, "nobody"))
    await link.publish(b"only the tap", Properties(), exchange=work, keys=["nobody"])
    await take(tap, 1)
    if how == "iterator":
        await soon(tap.aclose())
        assert await soon(tapping.counts(queue.name)) is None
    elif how == "close":
        await soon(tapping.close())
    else:
        bench.cut(tapping)

    async def publish_until_unroutable() -> None:
        while True:  # the broker notices a cut a moment later
            with contextlib.suppress(QueueFull):  # from RabbitMQ 4.3, which is deleting the queue
                await link.publish(b"nobody", Properties(), exchange=work, keys=["nobody"])
            await asyncio.sleep(0)

    with pytest.raises(Unroutable):
        await soon(publish_until_unroutable())


async def test_other_links_cannot_read_a_tap(bench):
    link = await bench.open()
    _, queue, _ = await tapped(bench)
    with pytest.raises(QueueInUse):
        await soon(link.consume(queue.name, prefetch=1))


@pytest.mark.rabbit
async def test_the_tap_of_a_cluster_is_replicated(real):
    # When its node fails, RabbitMQ 4.3 keeps an exclusive queue, and refuses what is to go there.
    names = Topology(real.names.federation, "quorum")
    link, tapping, queue = await real.open(), await real.open(), names.tap("replicated")
    await link.declare([*names.shared(), *names.of_worker("a")])
    tap = await tapping.tap(queue, [Binding(queue.name, names.work, "a")])
    await link.publish(b"x", Properties(), exchange=names.work, keys=["a"])
    assert bodies(await take(tap, 1)) == [b"x"]
    counts = await link.counts(queue.name)  # None for an exclusive queue
    assert counts is not None
    assert counts.consumers == 1


async def test_only_a_slow_tap_loses_its_oldest_copies(bench):
    link = await bench.open()
    await link.declare([*bench.names.shared(), *bench.names.of_worker("a")])
    tapping = await bench.open()
    arguments = {"x-max-length": 2, "x-overflow": "drop-head"}
    queue = Queue(bench.names.tap("small").name, "of a test", arguments)
    tap = await tapping.tap(queue, [Binding(queue.name, bench.names.work, "a")])
    sent = numbered(60)  # more than is fetched ahead
    for body in sent:
        await link.publish(body, Properties(), exchange=bench.names.work, keys=["a"])
    assert await drain(link, bench.names.inbox("a")) == sent
    seen = [(await soon(anext(tap))).body]
    while seen[-1] != sent[-1]:
        seen.append((await soon(anext(tap))).body)
    assert len(seen) < len(sent)
    assert seen == sorted(seen, key=sent.index)


@pytest.mark.parametrize("how", ["ack", "release"])
async def test_settling_over_a_lost_link_does_nothing(bench, how):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    await put(one, queue, b"x")
    (delivery,) = await take(await one.consume(queue, prefetch=1), 1)
    bench.cut(one)
    await soon(one.lost())
    getattr(delivery, how)()
    deliveries = await two.consume(queue, prefetch=10)
    (again,) = await take(deliveries, 1)
    assert again.redelivered
    getattr(delivery, how)()
    again.ack()
    await put(two, queue, b"end")
    assert bodies(await take(deliveries, 1)) == [b"end"]


@pytest.mark.parametrize("how", ["cut", "close"])
async def test_a_lost_link_raises_in_every_pending_call(bench, how):
    link = await bench.open()
    queue, other = await bench.queue(link), await bench.queue(link, "other")
    waiting = [
        asyncio.ensure_future(anext(await link.consume(name, prefetch=1)))
        for name in (queue, other)
    ]
    lost = [asyncio.ensure_future(link.lost()) for _ in range(2)]
    await bench.settled(link)
    assert not any(task.done() for task in (*waiting, *lost))
    if how == "cut":
        bench.cut(link)
    else:
        await soon(link.close())
    await soon(asyncio.gather(*lost))
    for task in waiting:
        with pytest.raises(LinkLost):
            await soon(task)
    await soon(link.close())  # once more is fine


@pytest.mark.parametrize("how", ["cut", "close"])
async def test_every_call_on_a_lost_link_raises(bench, how):
    link = await bench.open()
    queue = await bench.queue(link)
    deliveries = await link.consume(queue, prefetch=1)
    if how == "cut":
        bench.cut(link)
    else:
        await link.close()
    await soon(link.lost())
    for asked in (
        lambda: link.publish(b"x", Properties(), exchange="", keys=[queue]),
        lambda: link.get(queue),
        lambda: link.purge(queue),
        lambda: link.declare([Queue(queue, "of a test")]),
        lambda: link.consume(queue, prefetch=1),
        lambda: anext(deliveries),
    ):
        with pytest.raises(LinkLost):
            await soon(asked())


async def test_losing_one_link_does_not_affect_others(bench):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    deliveries = await two.consume(queue, prefetch=5)
    await put(two, queue, b"before")
    (held,) = await take(deliveries, 1)
    bench.cut(one)
    await soon(one.lost())
    await put(two, queue, b"after")
    (after,) = await take(deliveries, 1)
    assert (after.body, after.redelivered) == (b"after", False)
    held.ack()


async def test_prefetched_deliveries_are_dropped_when_the_link_is_lost(bench):
    one, two = await bench.open(), await bench.open()
    queue = await bench.queue(one)
    await put(one, queue, *numbered(3))
    deliveries = await one.consume(queue, prefetch=10)
    await take(deliveries, 1)
    bench.cut(one)
    await soon(one.lost())
    with pytest.raises(LinkLost):
        await soon(anext(deliveries))
    assert bodies(await take(await two.consume(queue, prefetch=10), 3)) == numbered(3)


@pytest.mark.parametrize("what", ["get", "purge", "consume", "follow", "newest"])
async def test_using_a_missing_queue_loses_the_link(bench, what):
    link = await bench.open()
    name = f"{bench.names.federation}.missing"
    asked = {
        "get": lambda: link.get(name),
        "purge": lambda: link.purge(name),
        "consume": lambda: link.consume(name, prefetch=1),
        "follow": lambda: link.follow(name),
        "newest": lambda: link.newest(name),
    }[what]
    with pytest.raises(LinkLost):
        await soon(asked())


async def test_a_missing_queue_of_someone_else_is_empty(bench):
    link = await bench.open()
    assert await soon(link.get(f"{bench.names.federation}.missing", foreign=True)) is None
    queue = await bench.queue(link)
    await put(link, queue, b"x")
    assert (await soon(link.get(queue, foreign=True))).body == b"x"


@pytest.mark.rabbit
@pytest.mark.parametrize("how", ["stream", "exclusive"])
async def test_a_queue_that_its_owner_changes_does_not_lose_the_link(real, how):
    owner, link = await real.open(), await real.open()
    name = real.names.outbox("w")
    arguments = {"x-queue-type": "stream"} if how == "stream" else {}
    await owner.declare([Queue(name, "of a test", arguments)])
    await put(owner, name, b"x")
    if how == "exclusive":
        await owner.consume(name, prefetch=1, exclusive=True)
    gets = [asyncio.ensure_future(link.get(name, foreign=True)) for _ in range(4)]
    assert await soon(asyncio.gather(*gets)) == [None] * 4
    sound = await real.queue(link)
    await put(link, sound, b"y")
    got = await soon(link.get(sound, foreign=True))
    got.ack()
    await link.close()
    assert await drain(owner, sound) == []


# --- the broker itself -------------------------------------------------------------------------


async def test_a_restarted_broker_keeps_durable_messages():
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare([Queue("q", "of a test")])
    await put(link, "q", b"held", b"ready")
    await put(link, "q", b"transient", durable=False)
    held = await link.get("q")
    deliveries = await link.consume("q", prefetch=1)
    await take(deliveries, 1)
    broker.stop()
    await soon(link.lost())
    with pytest.raises(LinkLost):
        await anext(deliveries)
    held.ack()
    with pytest.raises(LinkLost, match="down"):
        await broker.open()
    broker.up = True
    link = await broker.open()
    assert await drain(link, "q") == [b"held", b"ready"]


class Refusing(Transport):
    """A transport that refuses every connection."""

    address = "nowhere"

    async def open(self) -> Link:
        raise BrokerError("wrong password")


async def test_links_are_reopened_with_backoff():
    broker = MemoryBroker()
    broker.up = False
    reasons: list[str] = []
    pauses = 0

    def longest() -> float:
        nonlocal pauses
        pauses += 1
        broker.up = pauses in (5, 7, 8)  # the sixth is that after the lost link
        return 1.0

    backoff = Backoff(first_s=0.001, most_s=0.004, give_up_s=1000)
    seen: list[Link] = []
    async with contextlib.aclosing(
        reconnecting(broker, backoff, reasons.append, longest)
    ) as opened:
        async for link in opened:
            assert broker.links == {link}  # the previous one is closed
            seen.append(link)
            if len(seen) == 1:
                assert pauses == 5
                broker.stop()
                await link.lost()
            elif len(seen) == 2:
                assert pauses == 7
                assert reasons == ["the broker is down"] * 2  # once in each outage
            elif len(seen) == 3:
                break
    assert len(set(seen)) == 3
    assert not broker.links


async def test_links_are_closed_when_their_user_fails():
    broker = MemoryBroker()

    async def use() -> None:
        async with contextlib.aclosing(reconnecting(broker, Backoff(), lambda *_: None)) as opened:
            async for _ in opened:
                raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        await use()
    assert not broker.links


async def test_reconnecting_gives_up_with_one_line_that_names_the_remedy():
    broker = MemoryBroker()
    broker.up = False
    reasons: list[str] = []
    backoff = Backoff(first_s=0.001, most_s=0.002, give_up_s=0.02)
    with pytest.raises(BrokerError, match=r"fluffle broker up.*--url"):
        await soon(anext(reconnecting(broker, backoff, reasons.append)))
    assert reasons == ["the broker is down"]


async def test_reconnecting_stops_at_a_permanent_refusal():
    with pytest.raises(BrokerError, match="wrong password"):
        await anext(reconnecting(Refusing(), Backoff(), lambda *_: pytest.fail("waited")))


async def test_run_all_cancels_the_others_when_one_fails():
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fail() -> None:
        raise LinkLost("gone")

    with pytest.raises(LinkLost, match="gone"):
        await soon(run_all(forever(), fail()))
    assert ended.is_set()


async def test_run_all_of_nothing_returns_at_once():
    task = asyncio.ensure_future(run_all())
    await soon(task)
    assert task.exception() is None


async def _fail_when_cancelled(begun: asyncio.Event) -> None:
    begun.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise LinkLost("in just that moment") from None


async def test_cancellation_during_a_link_loss_is_not_swallowed():
    begun = [asyncio.Event(), asyncio.Event()]
    task = asyncio.ensure_future(run_all(*map(_fail_when_cancelled, begun)))
    for each in begun:
        await soon(each.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(task)


async def test_a_cancelled_task_gets_no_other_link():
    opened, opening = [], asyncio.Event()

    class Lossy:
        address = "nowhere"

        async def open(self):
            opened.append(self)
            await _fail_when_cancelled(opening)

    task = asyncio.ensure_future(
        anext(reconnecting(Lossy(), Backoff(0.001, 0.002), lambda *_: None))
    )
    await soon(opening.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(task)
    assert len(opened) == 1


# --- only on a real RabbitMQ -------------------------------------------------------------------


@pytest.mark.rabbit
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("guest:guest", "guest:wrong", "password"), ("guest:guest", "nobody:guest", "nobody")],
)
async def test_wrong_credentials_are_an_error_at_once(rabbit_url, old, new, message):
    url = rabbit_url.replace(old, new)
    with pytest.raises(BrokerError, match=message) as caught:
        await soon(AmqpTransport(url, "test").open())
    assert "wrong" not in str(caught.value)  # the password is not shown


@pytest.mark.rabbit
async def test_an_unknown_vhost_is_an_error_at_once(rabbit_url):
    with pytest.raises(BrokerError, match="vhost"):
        await soon(AmqpTransport(f"{rabbit_url}no-such-vhost", "test").open())


async def test_a_certificate_that_is_being_replaced_is_waited_for(tmp_path):
    ca = tmp_path / "ca.pem"
    transport = AmqpTransport(f"amqps://localhost:1/?cafile={ca}", "contract test")
    with pytest.raises(UsageError, match="ca.pem"):
        await transport.open()
    transport._was_connected = True
    ca.write_text("half a cert")
    with pytest.raises(LinkLost, match="ca.pem"):
        await transport.open()


async def test_a_port_without_a_listener_is_a_lost_link(unused_tcp_port):
    transport = AmqpTransport(f"amqp://guest:secret@127.0.0.1:{unused_tcp_port}/", "test")
    with pytest.raises(LinkLost):
        await soon(transport.open())
    assert "secret" not in transport.address


@pytest.mark.rabbit
async def test_the_first_reachable_url_is_used(rabbit_url, unused_tcp_port):
    nobody = f"amqp://guest:guest@127.0.0.1:{unused_tcp_port}/"
    transport = AmqpTransport(f"{nobody}, {rabbit_url}", "test")
    assert str(unused_tcp_port) in transport.address
    link = await soon(transport.open())
    try:
        assert await link.counts(f"t{uuid.uuid4().hex}.none") is None
        assert transport.address == rabbit_url.replace("guest:guest@", "")
    finally:
        await link.close()


@pytest.mark.rabbit
async def test_a_quorum_queue_has_one_exclusive_consumer_until_its_link_is_lost(real):
    # RabbitMQ itself accepts any number of them.
    one, two = await real.open(), await real.open()
    queue = await real.queue(one, x_queue_type="quorum")
    await real.queue(two, x_queue_type="quorum")
    await one.consume(queue, prefetch=1, exclusive=True)
    with pytest.raises(QueueInUse):
        await soon(two.consume(queue, prefetch=1, exclusive=True))
    real.cut(one)
    deliveries = await soon(consume_when_free(two, queue))
    await put(two, queue, b"x")
    assert bodies(await take(deliveries, 1)) == [b"x"]


@pytest.mark.rabbit
async def test_a_cancellation_at_the_moment_of_connecting_is_not_lost(rabbit_url, monkeypatch):
    original, connected = aiormq.connect, list[Any]()

    async def connect_and_cancel(*args: Any, **options: Any) -> Any:
        connected.append(await original(*args, **options))
        opening.cancel()
        return connected[0]

    monkeypatch.setattr(aiormq, "connect", connect_and_cancel)
    opening = asyncio.ensure_future(AmqpTransport(rabbit_url, "test").open())
    with pytest.raises(asyncio.CancelledError):
        await soon(opening)
    await connected[0].close()


@pytest.mark.rabbit
@pytest.mark.parametrize("held", [0, 1])
async def test_either_lock_of_a_quorum_queue_keeps_others_out(real, held):
    link, holder = await real.open(), await aio_pika.connect(real.url)
    queue = await real.queue(link, x_queue_type="quorum")
    lock = await (await holder.channel()).declare_queue(locks_of(queue)[held], exclusive=True)
    with pytest.raises(QueueInUse):
        await soon(link.consume(queue, prefetch=1, exclusive=True))
    await lock.delete()
    await soon(link.consume(queue, prefetch=1, exclusive=True))
    await holder.close()


@pytest.mark.rabbit
async def test_the_lock_of_a_failed_node_keeps_nobody_out(real, monkeypatch):
    # A stand-in for RabbitMQ 4.3, which refuses to declare such a lock, and does not find it.
    one, two = await real.open(), await real.open()
    queue = await real.queue(one, x_queue_type="quorum")
    await real.queue(two, x_queue_type="quorum")
    original = aiormq.Channel.queue_declare

    async def declare(self, name: str = "", *, passive: bool = False, **options: Any) -> Any:
        if name == locks_of(queue)[0]:
            refusal = ChannelNotFoundEntity if passive else ChannelLockedResource
            raise refusal("the node of this queue is down")
        return await original(self, name, passive=passive, **options)

    monkeypatch.setattr(aiormq.Channel, "queue_declare", declare)
    await soon(one.consume(queue, prefetch=1, exclusive=True))
    with pytest.raises(QueueInUse):
        await soon(two.consume(queue, prefetch=1, exclusive=True))


@pytest.mark.rabbit
async def test_a_consumer_that_is_cancelled_while_it_starts_holds_no_messages(real, monkeypatch):
    link = await real.open()
    queue = await real.queue(link)
    await put(link, queue, b"x")
    original, started = aiormq.Channel.basic_consume, asyncio.Event()

    async def consume_without_end(*args: Any, **options: Any) -> None:
        await original(*args, **options)
        started.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(aiormq.Channel, "basic_consume", consume_without_end)
    consuming = asyncio.ensure_future(link.consume(queue, prefetch=1))
    await soon(started.wait())
    consuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(consuming)
    assert (await soon(link.counts(queue))).consumers == 0
    assert await drain(link, queue) == [b"x"]


@pytest.mark.rabbit
async def test_a_publish_with_an_unknown_outcome_is_a_lost_link(real):
    link = await real.open()
    queue = await real.queue(link)
    real.proxy(link).hold()
    publishing = asyncio.ensure_future(link.publish(b"x", Properties(), exchange="", keys=[queue]))
    getting = asyncio.ensure_future(link.get(queue))
    await asyncio.sleep(0)
    real.cut(link)
    with pytest.raises(LinkLost):
        await soon(publishing)
    with pytest.raises(LinkLost):
        await soon(getting)


async def test_urgent_messages_arrive_or_are_unroutable_like_others(bench):
    link = await bench.open()
    queue = await bench.queue(link)
    about = Properties(type="heartbeat", message_id="m")
    await soon(link.publish(b"x", about, exchange="", keys=[queue], urgent=True))
    with pytest.raises(Unroutable):
        await soon(link.publish(b"x", about, exchange="", keys=["nobody"], urgent=True))
    assert await drain(link, queue) == [b"x"]


async def test_parts_that_were_fetched_in_vain_return_to_the_queue(bench, monkeypatch):
    monkeypatch.setattr("fluffle_common.protocol.wire_format.PART_BYTES", 64)
    link = await bench.open()
    outbox, updates = await bench.queue(link, "o"), await bench.queue(link, "u")
    of = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": "w"}
    update = Update(**of, num_examples=1, seconds=0.0)
    weights = {"w": np.arange(80.0)}
    for _ in range(2):  # the worker sent it again
        sending = send_tensors(
            link, update, weights, Route("", [updates]), parts=Route("", [outbox])
        )
        await soon(sending)
    for _ in range(2):
        announced, _ = decode((await soon(link.get(updates))).body)
        into = Assembly(announced.transfer)
        await soon(fetch(link, outbox, into, "rejected"))
        assert into.payload() == weights["w"].tobytes()
        await bench.settled(link)
    assert (await link.counts(outbox)).ready == 0


async def test_garbage_among_the_parts_costs_a_bounded_time(bench, monkeypatch):
    """Regression: the run waited past its deadline while a worker's full outbox was emptied."""
    monkeypatch.setattr("fluffle_common.protocol.wire_format.PART_BYTES", 64)
    link = await bench.open()
    outbox, updates, rejected = [await bench.queue(link, name) for name in "our"]
    await put(link, outbox, *numbered(150))
    of = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": "w"}
    update = Update(**of, num_examples=1, seconds=0.0)
    weights, route = {"w": np.arange(80.0)}, Route("", [updates])
    await soon(send_tensors(link, update, weights, route, parts=Route("", [outbox])))
    announced, _ = decode((await soon(link.get(updates))).body)
    assert announced.transfer.parts == 10
    with pytest.raises(PartsGone, match="only 0 of 10 parts arrived"):
        await soon(fetch(link, outbox, Assembly(announced.transfer), rejected))
    await bench.settled(link)
    assert (await link.counts(outbox)).ready == 60
    assert (await link.counts(rejected)).ready == 100


@pytest.mark.rabbit
async def test_a_get_that_is_cancelled_when_its_message_arrives_returns_it(real, monkeypatch):
    link = await real.open()
    queue = await real.queue(link)
    await put(link, queue, b"x")
    original = ContentChannel._answer_get

    def answer_and_cancel(channel: ContentChannel, message: Any) -> None:
        original(channel, message)
        getting.cancel()

    monkeypatch.setattr(ContentChannel, "_answer_get", answer_and_cancel)
    getting = asyncio.ensure_future(link.get(queue))
    with pytest.raises(asyncio.CancelledError):
        await soon(getting)
    monkeypatch.undo()
    assert await drain(link, queue) == [b"x"]


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 8, 13, 21])
async def test_a_cancelled_request_does_not_affect_later_ones(bench, turns):
    link = await bench.open()
    queue = await bench.queue(link)
    for name in (queue, "missing", queue):
        counting = asyncio.ensure_future(link.counts(name))
        for _ in range(turns):
            await asyncio.sleep(0)
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
    assert (await soon(link.counts(queue))).ready == 0
    assert await soon(link.counts("missing")) is None


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 8, 13, 21])
async def test_a_cancelled_request_keeps_the_link(bench, turns):
    link, names = await bench.open(), bench.names
    await link.declare(names.shared())
    binding = Binding(names.updates, names.results, "update.#")
    for request in (
        lambda: link.declare(names.of_worker("w")),
        lambda: link.unbind(binding),
        lambda: link.declare([binding]),
        lambda: link.purge(names.updates),
        lambda: link.tap(names.tap(uuid.uuid4().hex), []),
    ):
        requesting = asyncio.ensure_future(request())
        for _ in range(turns):
            await asyncio.sleep(0)
        requesting.cancel()
        await asyncio.gather(requesting, return_exceptions=True)
    await soon(link.declare(names.of_worker("w")))
    await put(link, names.inbox("w"), b"x")
    assert await soon(link.purge(names.inbox("w"))) == 1


@pytest.mark.rabbit
async def test_a_queue_that_another_connection_has_for_itself_counts_as_missing(real):
    link = await real.open()
    names = real.names
    await link.declare(names.shared())
    async with await aio_pika.connect(real.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(names.inbox("w"), exclusive=True)
        assert not await soon(link.bind(names.bindings_of("w")))
        assert await soon(link.counts(names.inbox("w"))) is None

    async def declare_once_free() -> None:
        while True:  # RabbitMQ 4.3 deletes the other queue a moment after the connection is closed
            with contextlib.suppress(QueueInUse):  # which ends the link
                return await (await real.open()).declare(names.queues_of("w"))

    await soon(declare_once_free())
    assert await soon(link.bind(names.bindings_of("w")))


@pytest.mark.rabbit
@pytest.mark.parametrize("parts", [2, 20], ids=["one by one", "streamed"])
async def test_parts_from_another_user_are_rejected(real, monkeypatch, parts):
    monkeypatch.setattr("fluffle_common.protocol.wire_format.PART_BYTES", 64)
    link = await real.open()
    outbox, updates, rejected = [await real.queue(link, name) for name in ("o", "u", "r")]
    of = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": "w"}
    update = Update(**of, num_examples=1, seconds=0.0)
    weights = {"w": np.arange(8.0 * parts)}
    to_outbox = Route("", [outbox])
    for user, taken in (("guest", True), ("mallory", False)):
        await soon(send_tensors(link, update, weights, Route("", [updates]), parts=to_outbox))
        announced, _ = decode((await soon(link.get(updates))).body)
        into = Assembly(announced.transfer)
        fetching = fetch(link, outbox, into, rejected, user=user)
        if taken:
            await soon(fetching)
            assert into.payload() == weights["w"].tobytes()
        else:
            with pytest.raises(PartsGone):
                await soon(fetching)
    assert (await link.counts(rejected)).ready == parts
    reason = (await soon(link.get(rejected))).properties.headers["reason"]
    assert reason == "the message names mallory as its sender, but the user guest sent it"


@pytest.mark.rabbit
async def test_urgent_messages_do_not_wait_behind_an_upload(real):
    link = await real.open()
    queue = await real.queue(link)
    signs = Properties(type="heartbeat", message_id="m")
    real.proxy(link).hold(0)  # the one to publish, which is opened first
    upload = asyncio.ensure_future(
        link.publish(bytes(10**6), Properties(), exchange="", keys=[queue])
    )
    await asyncio.sleep(0)
    await soon(link.publish(b"life", signs, exchange="", keys=[queue], urgent=True))
    with pytest.raises(Unroutable):
        await soon(link.publish(b"x", signs, exchange="", keys=["nobody"], urgent=True))
    assert not upload.done()
    assert (await soon(link.get(queue))).body == b"life"
    real.cut(link)
    with pytest.raises(LinkLost):
        await soon(upload)


@pytest.mark.rabbit
async def test_a_message_that_is_never_confirmed_ends_the_link(real, monkeypatch):
    monkeypatch.setattr("fluffle_common.transport.rabbitmq.confirms._CONFIRM_S", 0.2)
    monkeypatch.setattr("fluffle_common.transport.rabbitmq.confirms._CHECK_EVERY_S", 0.1)
    link = await real.open()
    queue = await real.queue(link)
    real.proxy(link).hold()
    with pytest.raises(LinkLost, match="confirm"):
        await soon(link.publish(b"x", Properties(), exchange="", keys=[queue]))
    await soon(link.lost())
    real.cut(link)


@pytest.mark.rabbit
async def test_closing_a_stalled_link_does_not_wait_for_what_has_not_left(real):
    link = await real.open()
    queue = await real.queue(link)
    real.proxy(link).hold()
    body = bytes(2**25)  # more than all buffers on the way hold
    publishing = asyncio.ensure_future(link.publish(body, Properties(), exchange="", keys=[queue]))
    await asyncio.sleep(0)
    await soon(link.close())
    with pytest.raises(LinkLost):
        await soon(publishing)


@pytest.mark.rabbit
async def test_a_quorum_queue_that_is_full_keeps_the_link(real):
    """Regression: a worker whose inbox refused everything ended the link again and again."""
    link = await real.open()
    settings = {"x_queue_type": "quorum", "x_max_length": 1, "x_overflow": "reject-publish"}
    queue = await real.queue(link, **settings)
    with pytest.raises(QueueFull):
        await soon(put(link, queue, *numbered(100)))
    while (delivery := await soon(link.get(queue))) is not None:
        delivery.ack()
    await put_when_there_is_room(link, queue)


async def put_when_there_is_room(link: Link, queue: str) -> None:
    """Put a message into a queue; a quorum queue takes a moment to notice that it has room."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(QueueFull):
                return await put(link, queue, b"x")


@pytest.mark.rabbit
async def test_a_channel_that_refuses_what_another_takes_ends_the_link(real, monkeypatch):
    # While a quorum queue elects a new leader, a channel can break for good.
    link = await real.open()
    queue = await real.queue(link, x_queue_type="quorum")
    original = ContentChannel.publish

    def publish(channel: ContentChannel, *message: Any) -> Any:
        confirmation = original(channel, *message)
        if channel is link._publish_channel:
            confirmation = asyncio.get_running_loop().create_future()
            confirmation.set_exception(QueueFull("the broker refused the message"))
        return confirmation

    monkeypatch.setattr(ContentChannel, "publish", publish)
    with pytest.raises(LinkLost, match="on one channel, but not on another"):
        await soon(put(link, queue, b"x"))
    await soon(link.lost())


@pytest.mark.rabbit
async def test_deleting_a_queue_loses_the_link_of_its_consumer(real):
    link = await real.open()
    queue = await real.queue(link)
    deliveries = await link.consume(queue, prefetch=1)
    waiting = asyncio.ensure_future(anext(deliveries))
    async with await aio_pika.connect(real.url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(queue)
    await soon(link.lost())
    with pytest.raises(LinkLost, match="deleted"):
        await soon(waiting)


@pytest.mark.rabbit
@pytest.mark.parametrize("how", ["queue", "channel"])
async def test_what_ends_a_consumer_as_it_starts_loses_the_link(real, monkeypatch, how):
    link = await real.open()
    queue = await real.queue(link)
    original = aiormq.Channel.basic_consume

    async def consume_and_end(channel: aiormq.Channel, *args: Any, **options: Any) -> Any:
        consume_ok = await original(channel, *args, **options)
        if how == "channel":
            await channel.basic_ack(99)  # an unknown tag
            await soon(asyncio.wait([channel.closing]))
        else:
            ended = asyncio.Event()
            channel.on_consumer_cancel_callbacks.add(lambda _: ended.set())
            async with await aio_pika.connect(real.url) as connection:
                await (await connection.channel()).queue_delete(queue)
            await soon(ended.wait())
        return consume_ok

    monkeypatch.setattr(aiormq.Channel, "basic_consume", consume_and_end)
    with pytest.raises(LinkLost):
        await soon(anext(await soon(link.consume(queue, prefetch=1))))
    await soon(link.lost())


@pytest.mark.rabbit
@pytest.mark.parametrize(
    ("text", "kept"), [("字" * 400, 3), ("y" * 8_000, 3), ("y" * 130_900, None)]
)
async def test_large_headers_are_dropped_when_rejecting(real, text, kept):
    # Headers that fill a frame would not fit into one together with the reason, and the broker
    # would close the connection. They are not even read.
    link = await real.open()
    queue, rejected = await real.queue(link), await real.queue(link)
    async with await aio_pika.connect(real.url) as connection:
        channel = await connection.channel()
        huge = aio_pika.Message(b"x", headers={"huge": text, "round": 3})
        await channel.default_exchange.publish(huge, queue)
    delivery = await soon(link.get(queue))
    await soon(reject(link, delivery, MalformedMessage("it is no message"), rejected))
    message = await soon(link.get(rejected))
    headers = message.properties.headers
    assert headers["reason"] == "it is no message"
    assert "huge" not in headers
    assert headers.get("round") == kept
