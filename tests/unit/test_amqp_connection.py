"""Large bodies past aiormq: what goes in at one end of the framing comes out at the other."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame, header
from pamqp.body import ContentBody
from pamqp.heartbeat import Heartbeat

from fluffle_common import amqp_connection as ac
from fluffle_common.amqp_connection import LARGE_BYTES, Incoming, Outgoing

SIZES = st.sampled_from([0, 1, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, 3 * LARGE_BYTES])


def framed(channel: int, method: object, body: bytes, room: int = 10_000) -> list[bytes]:
    """Return the frames of a method with content, as RabbitMQ sends them."""
    pieces = [body[start : start + room] for start in range(0, len(body), room)]
    frames = [method, header.ContentHeader(body_size=len(body)), *map(ContentBody, pieces)]
    return [frame.marshal(one, channel) for one in frames]


def deliver(channel: int, tag: int, body: bytes) -> list[bytes]:
    return framed(channel, commands.Basic.Deliver("reader", tag, False, "", "key"), body)


class Fed:
    """What aiormq would get."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.incoming = Incoming(self.data.extend)

    def frames(self) -> list[object]:
        found, rest = [], bytes(self.data)
        while rest:
            count, _, one = frame.unmarshal(rest)
            found.append(one)
            rest = rest[count:]
        return found


def content(body: bytes, seed: int) -> bytes:
    return bytes((seed + index) % 251 for index in range(len(body)))


@given(
    sizes=st.lists(SIZES, min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 20_000), min_size=1, max_size=20),
)
def test_bodies_come_whole_however_the_socket_cuts_the_bytes(sizes, cuts):
    bodies = [content(bytes(size), seed) for seed, size in enumerate(sizes)]
    stream = b"".join(b"".join(deliver(1, tag, body)) for tag, body in enumerate(bodies, 1))
    fed, at, turn = Fed(), 0, 0
    while at < len(stream):
        fed.incoming.received(stream[at : at + cuts[turn % len(cuts)]])
        at += cuts[turn % len(cuts)]
        turn += 1
    headers = [one for one in fed.frames() if isinstance(one, header.ContentHeader)]
    assert len(headers) == len(bodies)
    for tag, body in enumerate(bodies, 1):
        if len(body) < LARGE_BYTES:
            assert headers[tag - 1].body_size == len(body)
            assert fed.incoming.take(1, tag) is None
        else:
            assert headers[tag - 1].body_size == 0
            assert fed.incoming.take(1, tag) == body
            assert fed.incoming.take(1, tag) is None
    small = b"".join(one.value for one in fed.frames() if isinstance(one, ContentBody))
    assert small == b"".join(body for body in bodies if len(body) < LARGE_BYTES)


def test_channels_may_take_turns_and_heartbeats_come_between():
    one, two = content(bytes(50_000), 1), content(bytes(40_000), 2)
    first, second = deliver(1, 7, one), framed(2, commands.Basic.GetOk(7, False, "", "k", 0), two)
    beat = frame.marshal(Heartbeat(), 0)
    fed = Fed()
    for pair in zip(first, second + [b""] * (len(first) - len(second)), strict=True):
        for piece in (*pair, beat):
            fed.incoming.received(piece)
    assert fed.incoming.take(1, 7) == one
    assert fed.incoming.take(2, 7) == two
    assert sum(isinstance(each, Heartbeat) for each in fed.frames()) == len(first)


def test_what_was_returned_is_not_kept_and_a_closed_channel_leaves_nothing():
    fed = Fed()
    returned = commands.Basic.Return(312, "NO_ROUTE", "", "key")
    fed.incoming.received(b"".join(framed(1, returned, bytes(LARGE_BYTES))))
    fed.incoming.received(b"".join(deliver(1, 1, bytes(LARGE_BYTES))))
    fed.incoming.received(b"".join(deliver(2, 1, bytes(LARGE_BYTES))))
    fed.incoming.received(frame.marshal(commands.Channel.CloseOk(), 1))
    assert fed.incoming.take(1, 1) is None
    assert fed.incoming.take(2, 1) is not None
    assert [one.body_size for one in fed.frames() if isinstance(one, header.ContentHeader)] == [
        0
    ] * 3


def test_another_protocol_is_passed_on_as_it_is():
    fed = Fed()
    fed.incoming.received(b"AMQ")
    fed.incoming.received(b"P\x00\x00\x09\x01more")
    assert fed.data == b"AMQP\x00\x00\x09\x01more"


def test_a_frame_that_does_not_end_breaks_the_connection():
    head, size, body, *_ = deliver(1, 1, bytes(LARGE_BYTES))
    with pytest.raises(ConnectionError, match="does not end"):
        Fed().incoming.received(head + size + body[:-1] + b"\x00")


@given(size=SIZES, most=st.sampled_from([None, 4096, 131072]))
def test_what_is_sent_for_a_token_is_what_aiormq_would_have_sent(size, most):
    outgoing, room = Outgoing(), (most or 131072) - 8
    if most:
        outgoing.expand(frame.marshal(commands.Connection.TuneOk(0, most, 0), 0))
    body = content(bytes(size), 3)
    publish = commands.Basic.Publish(exchange="letters.work", routing_key="w1")
    with outgoing.token(body) as token:
        sent = outgoing.expand(b"".join(framed(5, publish, token)))
    assert b"".join(sent) == b"".join(framed(5, publish, body, room))


def test_what_holds_no_token_is_left_alone_and_a_token_serves_once():
    outgoing = Outgoing()
    beat = frame.marshal(Heartbeat(), 0)
    assert outgoing.expand(beat) == [beat]
    plain = b"".join(framed(1, commands.Basic.Publish(), b"sixteen bytes !!"))
    assert outgoing.expand(plain) == [plain]
    with outgoing.token(b"x" * LARGE_BYTES) as token:
        pass
    given_up = b"".join(framed(1, commands.Basic.Publish(), token))
    assert outgoing.expand(given_up) == [given_up]


def test_the_place_of_the_size_is_where_amqp_has_it():
    data = frame.marshal(header.ContentHeader(body_size=2**40 + 7), 3)
    assert struct.unpack_from(">Q", data, ac._SIZE_AT) == (2**40 + 7,)
