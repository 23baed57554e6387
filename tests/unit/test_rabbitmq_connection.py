"""The message path that bypasses aiormq: framing, confirms and acknowledgements."""

import asyncio
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame, header
from pamqp.body import ContentBody
from pamqp.heartbeat import Heartbeat

from fluffle_common.errors import LinkLost
from fluffle_common.transport.base import QueueFull, Unroutable
from fluffle_common.transport.rabbitmq import frames
from fluffle_common.transport.rabbitmq.channel import Content, ContentChannel
from fluffle_common.transport.rabbitmq.connection import FrameSplitter

SMALL = 16 * 2**10
SIZES = st.sampled_from([0, 1, 1000, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL])
FRAME_MAX = 131072
PATIENCE_S = 60.0


def framed(
    channel: int, method: object, body: bytes, room: int = 10_000, **properties: object
) -> list[bytes]:
    """Return the frames of a method with a body, as RabbitMQ sends them."""
    pieces = [body[start : start + room] for start in range(0, len(body), room)]
    about = commands.Basic.Properties(**properties)
    head = header.ContentHeader(body_size=len(body), properties=about)
    return [frame.marshal(one, channel) for one in [method, head, *map(ContentBody, pieces)]]


def deliver(channel: int, tag: int, body: bytes) -> list[bytes]:
    return framed(channel, commands.Basic.Deliver("reader", tag, False, "", "key"), body)


def sent(data: bytes) -> list[object]:
    """Decode frames with pamqp."""
    parsed, rest = [], data
    while rest:
        count, _, one = frame.unmarshal(rest)
        parsed.append(one)
        rest = rest[count:]
    return parsed


def content(size: int, seed: int) -> bytes:
    return bytes((seed + index) % 251 for index in range(size))


class Ends:
    """A connection under test: what aiormq gets, what is delivered and what is written."""

    def __init__(self, *channels: int, frame_max: int = FRAME_MAX, prefetch: int = 0) -> None:
        self.fed, self.written = bytearray(), bytearray()
        self.news = asyncio.Event()
        self.now, self.closing = 0.0, False
        self.delivered: list[tuple[int, Content]] = []
        self.splitter = FrameSplitter(self.fed.extend, lambda: self.now)
        self.channels = {
            number: ContentChannel(
                number,
                self,
                frame_max,
                lambda one, number=number: self.delivered.append((number, one)),
                prefetch,
            )
            for number in channels
        }
        for each in self.channels.values():
            self.splitter.attach(each)

    def write(self, data: bytes) -> None:
        self.written += data
        self.news.set()

    def writelines(self, pieces: list[bytes]) -> None:
        self.written += b"".join(pieces)

    def is_closing(self) -> bool:
        return self.closing


@given(
    sizes=st.lists(SIZES, min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 20_000), min_size=1, max_size=20),
)
def test_bodies_arrive_whole_however_the_bytes_are_split(sizes, cuts):
    bodies = [content(size, seed) for seed, size in enumerate(sizes)]
    beat = frame.marshal(Heartbeat(), 0)
    stream = b"".join(b"".join(deliver(1, tag, body)) + beat for tag, body in enumerate(bodies, 1))
    ends, at, turn = Ends(1), 0, 0
    while at < len(stream):
        ends.splitter.data_received(stream[at : at + cuts[turn % len(cuts)]])
        at += cuts[turn % len(cuts)]
        turn += 1
    assert [one.body for _, one in ends.delivered] == bodies
    assert [one.tag for _, one in ends.delivered] == [*range(1, len(bodies) + 1)]
    assert ends.fed == beat * len(bodies)


def test_the_bytes_of_incomplete_bodies_are_counted():
    ends, (method, head, first, *rest) = Ends(1), deliver(1, 1, content(50_000, 1))
    ends.splitter.data_received(method + head + first[:1007])
    assert ends.splitter.incomplete_bytes == 1000
    ends.splitter.data_received(first[1007:])
    assert ends.splitter.incomplete_bytes == 10_000
    ends.splitter.data_received(b"".join(rest))
    assert ends.splitter.incomplete_bytes == 0


@pytest.mark.parametrize(("size", "kept"), [(7_000, True), (9_000, False)])
def test_huge_properties_are_dropped(size, kept):
    deliver_ok = commands.Basic.Deliver("reader", 1, False, "", "key")
    headers = {f"h{number}": "v" * 100 for number in range(size // 110)}
    ends = Ends(1)
    stream = framed(1, deliver_ok, b"body", headers=headers, user_id="w")
    ends.splitter.data_received(b"".join(stream))
    ((_, delivered),) = ends.delivered
    told = frames.properties(delivered.header)
    assert (delivered.body, told.user_id, bool(told.headers)) == (
        b"body",
        (kept and "w") or None,
        kept,
    )


def test_channels_may_interleave_and_other_frames_go_to_aiormq():
    one, two, three = content(50_000, 1), content(40_000, 2), content(30_000, 3)
    streams = [deliver(1, 7, one), deliver(2, 9, two), deliver(3, 1, three)]
    ends = Ends(1, 2)
    for turn in range(max(map(len, streams))):
        for stream in streams:
            for piece in stream[turn : turn + 1]:
                ends.splitter.data_received(piece)
    assert sorted((number, one.body) for number, one in ends.delivered) == [
        (1, one),
        (2, two),
    ]
    assert ends.fed == b"".join(streams[2])


def test_other_methods_of_a_channel_go_to_aiormq():
    ends = Ends(1)
    rest = [
        frame.marshal(commands.Basic.ConsumeOk("reader"), 1),
        frame.marshal(commands.Basic.Cancel("reader", False), 1),
        frame.marshal(commands.Queue.PurgeOk(3), 1),
        frame.marshal(commands.Channel.Close(406, "no", 0, 0), 1),
    ]
    ends.splitter.data_received(b"".join(rest))
    assert ends.fed == b"".join(rest)
    assert not ends.delivered


def test_aiormq_gets_heartbeats_while_only_messages_arrive():
    ends = Ends(1)
    for second in range(12):
        ends.now = float(second)
        ends.splitter.data_received(b"".join(deliver(1, second + 1, b"x")))
    assert [type(one) for one in sent(bytes(ends.fed))] == [Heartbeat]
    ends.now = 13.0
    ends.splitter.data_received(frame.marshal(Heartbeat(), 0))
    ends.now = 17.0
    ends.splitter.data_received(b"".join(deliver(1, 99, b"x")))
    assert len(sent(bytes(ends.fed))) == 2


def test_another_protocol_is_passed_on_unchanged():
    ends = Ends()
    ends.splitter.data_received(b"AMQ")
    ends.splitter.data_received(b"P\x00\x00\x09\x01more")
    assert ends.fed == b"AMQP\x00\x00\x09\x01more"


@pytest.mark.parametrize("size", [1, SMALL])
def test_a_frame_without_an_end_byte_breaks_the_connection(size):
    method, head, body, *_ = deliver(1, 1, bytes(size))
    with pytest.raises(ConnectionError, match="does not end"):
        Ends(1).splitter.data_received(method + head + body[:-1] + b"\x00")
    with pytest.raises(ConnectionError, match="does not end"):
        Ends(1).splitter.data_received(method[:-1] + b"\x00")


def test_a_body_longer_than_announced_breaks_the_connection():
    method, head, _ = deliver(1, 1, b"abc")
    too_much = frame.marshal(ContentBody(b"abcd"), 1)
    with pytest.raises(ConnectionError, match="longer"):
        Ends(1).splitter.data_received(method + head + too_much)


HEADERS = {
    "worker": "w1",
    "round": 7,
    "bytes": 2**40,
    "loss": 0.25,
    "last": True,
    "first": False,
    "CC": ["inbox.a", "inbox.ü"],
}


@given(size=SIZES, most=st.sampled_from([4096, FRAME_MAX]), durable=st.booleans())
def test_published_frames_are_valid_amqp(size, most, durable):
    async def publish() -> bytes:
        ends, body = Ends(5, frame_max=most), content(size, 3)
        head = frames.publish(
            5,
            size,
            exchange="letters.work",
            key="w1",
            kind="fit",
            message_id="fit/1",
            user="guest",
            headers=HEADERS,
            durable=durable,
        )
        ends.channels[5].publish(head, "fit/1", body)
        return bytes(ends.written)

    written = asyncio.run(publish())
    method, head, *bodies = sent(written)
    assert isinstance(method, commands.Basic.Publish)
    assert (method.exchange, method.routing_key) == ("letters.work", "w1")
    assert (method.mandatory, method.immediate) == (True, False)
    properties = head.properties
    assert (head.body_size, properties.headers) == (size, HEADERS)
    assert (properties.message_type, properties.message_id) == ("fit", "fit/1")
    assert (properties.user_id, properties.content_type) == ("guest", "application/msgpack")
    assert properties.delivery_mode == (2 if durable else 1)
    assert properties.timestamp is not None
    assert b"".join(one.value for one in bodies) == content(size, 3)
    assert all(len(one.value) + 8 <= most for one in bodies)


def test_integers_have_the_type_that_every_client_reads_if_it_holds_them():
    fields = {"exchange": "", "key": "", "kind": "", "message_id": "", "user": ""}
    headers = {"least": -(2**31), "most": 2**31 - 1, "more": 2**31}
    table = frames.publish(1, 0, headers=headers, durable=False, **fields)
    assert b"\x05leastI\x80\0\0\0" in table
    assert b"\x04mostI\x7f\xff\xff\xff" in table
    assert b"\x04morel\0\0\0\0\x80\0\0\0" in table


def test_a_name_too_long_for_amqp_is_refused():
    fields = {"exchange": "", "kind": "", "message_id": "", "user": "", "headers": {}}
    with pytest.raises(ValueError, match="range"):
        frames.publish(1, 0, key="k" * 256, durable=False, **fields)


def published(ends: Ends, *ids: str) -> list[asyncio.Future[None]]:
    return [ends.channels[1].publish(b"", one, b"") for one in ids]


def outcomes(futures: list[asyncio.Future[None]]) -> list[object]:
    return [
        None if not one.done() else type(one.exception()) if one.exception() else True
        for one in futures
    ]


async def test_confirmations_settle_one_message_or_all_earlier_ones():
    ends = Ends(1)
    five = published(ends, "a", "b", "c", "d", "e")
    ends.splitter.data_received(frame.marshal(commands.Basic.Ack(2), 1))
    assert outcomes(five) == [None, True, None, None, None]
    ends.splitter.data_received(frame.marshal(commands.Basic.Nack(3, multiple=True), 1))
    assert outcomes(five) == [QueueFull, True, QueueFull, None, None]
    ends.splitter.data_received(frame.marshal(commands.Basic.Ack(5, multiple=True), 1))
    assert outcomes(five) == [QueueFull, True, QueueFull, True, True]
    assert not ends.fed


async def test_a_returned_message_is_unroutable_once_it_is_confirmed():
    ends = Ends(1)
    three = published(ends, "a", "b", "a")
    back = commands.Basic.Return(312, "NO_ROUTE", "letters.work", "w9")
    for message_id in ("b", "a"):
        ends.splitter.data_received(b"".join(framed(1, back, bytes(SMALL), message_id=message_id)))
    assert outcomes(three) == [None, None, None]
    ends.splitter.data_received(frame.marshal(commands.Basic.Ack(3, multiple=True), 1))
    assert outcomes(three) == [Unroutable, Unroutable, True]
    assert "NO_ROUTE at exchange 'letters.work' for the routing key 'w9'" in str(
        three[0].exception()
    )
    assert not ends.delivered


async def test_cancelled_futures_are_skipped():
    ends = Ends(1)
    one, two = published(ends, "a", "b")
    one.cancel()
    ends.splitter.data_received(frame.marshal(commands.Basic.Ack(2, multiple=True), 1))
    assert two.done()
    first, second = ends.channels[1].get("q"), ends.channels[1].get("q")
    first.cancel()
    ends.written.clear()
    for tag, body in ((4, b"x"), (5, b"y")):
        got = commands.Basic.GetOk(tag, True, "e", "k", 0)
        ends.splitter.data_received(b"".join(framed(1, got, body)))
    assert second.result().body == b"y"
    (back,) = sent(bytes(ends.written))  # what nobody waits for goes back to its queue
    assert (back.delivery_tag, back.requeue, back.multiple) == (4, True, False)


async def test_nothing_is_sent_on_a_channel_that_the_broker_has_closed():
    ends = Ends(1)
    ends.splitter.data_received(b"".join(deliver(1, 1, b"x")))
    ends.channels[1].ack(1)
    waiting = ends.channels[1].get("q")
    ends.written.clear()
    closed = frame.marshal(commands.Channel.Close(404, "NOT_FOUND", 0, 0), 1)
    ends.splitter.data_received(closed)
    assert ends.fed == closed  # aiormq confirms it
    ends.channels[1].close(LinkLost("NOT_FOUND"))
    assert not ends.written
    with pytest.raises(LinkLost, match="NOT_FOUND"):
        await waiting


async def test_a_closed_channel_keeps_no_deliveries():
    ends = Ends(1)
    ends.channels[1].close(LinkLost("the consumer was closed"))
    ends.splitter.data_received(b"".join(deliver(1, 1, b"x")))
    assert not ends.delivered


async def test_gets_are_answered_in_order():
    ends = Ends(1)
    getting = [ends.channels[1].get("letters.outbox.w1") for _ in range(2)]
    assert [(one.queue, one.no_ack) for one in sent(bytes(ends.written))] == [
        ("letters.outbox.w1", False)
    ] * 2
    got = commands.Basic.GetOk(8, True, "letters.results", "part.w1", 3)
    ends.splitter.data_received(b"".join(framed(1, got, bytes(SMALL))))
    ends.splitter.data_received(frame.marshal(commands.Basic.GetEmpty(), 1))
    there = getting[0].result()
    assert frames.origin(there.method) == (True, "letters.results", "part.w1")
    assert there.tag == 8
    assert there.body == bytes(SMALL)
    assert getting[1].result() is None


async def test_a_closed_socket_is_not_written_to():
    """uvloop would raise RuntimeError, before aiormq notices the end of the connection."""
    ends = Ends(1)
    ends.splitter.data_received(b"".join(deliver(1, 1, b"x")))
    ends.channels[1].ack(1)
    ends.closing = True
    with pytest.raises(LinkLost, match="lost"):
        published(ends, "a")
    with pytest.raises(LinkLost, match="lost"):
        ends.channels[1].get("q")
    ends.channels[1].requeue(1)
    ends.channels[1].ack(1)
    await asyncio.sleep(0)
    assert not ends.written


async def test_acknowledgements_are_batched_up_to_half_the_prefetch(monkeypatch):
    moment = "fluffle_common.transport.rabbitmq.channel._ACK_WITHIN_S"
    monkeypatch.setattr(moment, 3600.0)  # no pause of this process is so long
    ends = Ends(1, prefetch=6)
    for tag in range(1, 5):
        ends.splitter.data_received(b"".join(deliver(1, tag, b"x")))
    for tag in (1, 2):
        ends.channels[1].ack(tag)
        await asyncio.sleep(0)
    assert not ends.written
    ends.channels[1].ack(3)
    await asyncio.sleep(0)
    (three,) = sent(bytes(ends.written))
    assert (three.delivery_tag, three.multiple) == (3, True)
    ends.news.clear()
    monkeypatch.setattr(moment, 0.01)
    ends.channels[1].ack(4)
    async with asyncio.timeout(PATIENCE_S):
        await ends.news.wait()  # a moment later, it goes alone
    assert [one.delivery_tag for one in sent(bytes(ends.written))] == [3, 4]


async def test_a_lost_channel_raises_in_all_waiters_and_writes_no_more():
    ends = Ends(1)
    waiting = [*published(ends, "a"), ends.channels[1].get("q")]
    ends.written.clear()
    ends.channels[1].close(LinkLost("gone"))
    ends.channels[1].ack(1)
    ends.channels[1].requeue(1)
    assert outcomes(waiting) == [LinkLost, LinkLost]
    assert not ends.written


@given(
    turns=st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.integers(0, 10**6), max_size=5)), max_size=8
    ),
    cut=st.booleans(),
)
def test_batched_acknowledgements_cover_exactly_the_acknowledged_tags(turns, cut):
    async def run() -> None:
        ends, tag, open_tags, acked = Ends(1), 0, [], set()
        for arriving, choices in turns:
            for _ in range(arriving):
                tag += 1
                open_tags.append(tag)
                ends.splitter.data_received(b"".join(deliver(1, tag, b"x")))
            for choice in choices[: len(open_tags)]:
                mine = open_tags.pop(choice % len(open_tags))
                acked.add(mine)
                ends.channels[1].ack(mine)
            before = len(ends.written)
            await asyncio.sleep(0)
            if choices and not open_tags:
                assert len(sent(bytes(ends.written[before:]))) <= 1
        if open_tags:
            acked.add(open_tags[0])
            ends.channels[1].ack(open_tags[0])
        ends.closing = cut
        ends.channels[1].close(LinkLost("the end"))
        if cut and open_tags:
            acked.discard(open_tags[0])
        owed = set(range(1, tag + 1))
        for one in sent(bytes(ends.written)):
            settled = {each for each in owed if each <= one.delivery_tag}
            settled = settled if one.multiple else {one.delivery_tag}
            assert settled
            assert settled <= owed  # RabbitMQ closes the channel otherwise
            owed -= settled
        assert owed == set(range(1, tag + 1)) - acked

    asyncio.run(run())


def test_settling_frames_are_valid_amqp():
    one, several, back = sent(
        frames.ack(2, 7, multiple=False) + frames.ack(2, 8, multiple=True) + frames.requeue(2, 9)
    )
    assert (one.delivery_tag, one.multiple) == (7, False)
    assert (several.delivery_tag, several.multiple) == (8, True)
    assert (back.delivery_tag, back.multiple, back.requeue) == (9, False, True)


def nested(depth: int) -> bytes:
    """Return nested field arrays."""
    data = b""
    for _ in range(depth):
        data = b"A" + struct.pack(">I", len(data)) + data
    return data


ODD = {
    "of no known type": (1 << 13, struct.pack(">I", 3) + b"\1x?"),
    "longer than it is": (1 << 13, struct.pack(">I", 2**31)),
    "too deep": (1 << 13, struct.pack(">I", 2 + len(nested(3000))) + b"\1x" + nested(3000)),
    "of no time": (1 << 6, b"\xff" * 8),
    "not UTF-8": (1 << 7, b"\2\xff\xfe"),
}


@pytest.mark.parametrize("odd", ODD)
def test_malformed_properties_are_empty(odd):
    flags, data = ODD[odd]
    read = frames.properties(struct.pack(">HHQH", 60, 0, 0, flags) + data)
    assert (read.headers, read.timestamp, read.message_id) == (None, None, None)


def test_blocked_and_unblocked_frames_are_noticed():
    heard: list[str | None] = []
    fed = bytearray()
    splitter = FrameSplitter(fed.extend, on_blocked=heard.append)
    stream = [
        frame.marshal(one, 0)
        for one in (commands.Connection.Blocked("low on memory"), commands.Connection.Unblocked())
    ]
    for piece in stream:
        splitter.data_received(piece)
    assert heard == ["low on memory", None]
    assert fed == b"".join(stream), "aiormq hears of it too"
