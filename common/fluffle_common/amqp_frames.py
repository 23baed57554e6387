"""The frames of AMQP 0-9-1 that carry contents, and those that settle them, as bytes.

What is published here many times a round has an encoding of its own, of just the types that are
used. What is received is taken apart only as far as somebody asks: a delivery's properties are read
by ``pamqp``, and most are never read.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pamqp import commands
from pamqp.header import ContentHeader

from fluffle_common.transport import Body

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
END = b"\xce"
END_BYTE = END[0]
FRAME = struct.Struct(">BHI")  # type, channel, size; then the payload and one byte that ends it
A_HEARTBEAT = FRAME.pack(HEARTBEAT, 0, 0) + END

# What a method's payload begins with: its class, Basic, and number.
_BASIC = 60
_PUBLISH, RETURN, DELIVER, _GET, GET_OK, GET_EMPTY, ACK, NACK = (
    struct.pack(">HH", _BASIC, number) for number in (40, 50, 60, 70, 71, 72, 80, 120)
)
_KIND_SIZE = 4

_SIZE_AT = _KIND_SIZE  # in the payload of a content's header, after class and weight
_SIZE, _TAG = struct.Struct(">Q"), struct.Struct(">Q")
_SETTLED = struct.Struct(">4sQB")
_HEAD = struct.Struct(">HHQH")  # of a content's header: class, weight, size of the body, flags
_ALL_BEFORE, _REQUEUE = 1, 2
_MANDATORY = 1

# The properties that our messages have, as flags, in the order in which they follow.
_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 13, 1 << 12
_MESSAGE_ID, _TIMESTAMP, _TYPE, _USER_ID = 1 << 7, 1 << 6, 1 << 5, 1 << 4
_TRANSIENT, _PERSISTENT = b"\x01", b"\x02"

Value = str | int | float | bool | Sequence[str]


class Origin(NamedTuple):
    """What a delivery's method says: its tag, whether it came before, and where it was sent to."""

    tag: int
    redelivered: bool
    exchange: str
    key: str


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """Return a whole frame."""
    return FRAME.pack(kind, channel, len(payload)) + payload + END


def kind_of(payload: bytes) -> bytes:
    """Return a method's class and number, as they are on the wire."""
    return payload[:_KIND_SIZE]


def body_size(payload: bytes) -> int:
    """Return how many bytes follow a content's header."""
    size: int = _SIZE.unpack_from(payload, _SIZE_AT)[0]
    return size


# --- what is sent ------------------------------------------------------------------------------


def publish(
    channel: int,
    size: int,
    *,
    exchange: str,
    key: str,
    kind: str,
    message_id: str,
    user: str,
    headers: Mapping[str, Value],
    durable: bool,
) -> bytes:
    """Return the frames before the body of a message that some queue must take.

    Raises:
        ValueError: where a name has more than 255 bytes.
    """
    method = b"".join(
        [_PUBLISH, b"\0\0", _short(exchange), _short(key), bytes([_MANDATORY])]
    )
    flags = _CONTENT_TYPE | _HEADERS | _DELIVERY_MODE | _TIMESTAMP | _TYPE | _USER_ID
    properties = [
        _short("application/msgpack"),
        _table(headers),
        _PERSISTENT if durable else _TRANSIENT,
        _short(message_id) if message_id else b"",
        _TAG.pack(int(time.time())),
        _short(kind),
        _short(user),
    ]
    if message_id:
        flags |= _MESSAGE_ID
    head = b"".join([_HEAD.pack(_BASIC, 0, size, flags), *properties])
    return frame(METHOD, channel, method) + frame(HEADER, channel, head)


def bodies(channel: int, body: Body, frame_max: int) -> Iterator[Body]:
    """Yield the pieces that make up the frames of a body, which is not copied."""
    room, view = frame_max - FRAME.size - len(END), memoryview(body)
    for start in range(0, len(view), room):
        piece = view[start : start + room]
        yield FRAME.pack(BODY, channel, len(piece))
        yield piece
        yield END


def ack(channel: int, tag: int, *, all_before: bool) -> bytes:
    """Return the frame that acknowledges a delivery."""
    return frame(METHOD, channel, _SETTLED.pack(ACK, tag, _ALL_BEFORE if all_before else 0))


def requeue(channel: int, tag: int) -> bytes:
    """Return the frame that gives a delivery back."""
    return frame(METHOD, channel, _SETTLED.pack(NACK, tag, _REQUEUE))


def get(channel: int, queue: str) -> bytes:
    """Return the frame that asks for one message, to be acknowledged."""
    return frame(METHOD, channel, _GET + b"\0\0" + _short(queue) + b"\0")


@functools.lru_cache(1024)  # most are the same in every message
def _short(text: str) -> bytes:
    data = text.encode()
    return bytes([len(data)]) + data


def _long(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _table(values: Mapping[str, Value]) -> bytes:
    return _long(b"".join([_short(name) + _value(value) for name, value in values.items()]))


def _value(value: Value) -> bytes:
    match value:
        case bool():
            return b"t\1" if value else b"t\0"
        case int():
            return b"l" + struct.pack(">q", value)
        case float():
            return b"d" + struct.pack(">d", value)
        case str():
            return b"S" + _long(value.encode())
    return b"A" + _long(b"".join(map(_value, value)))


# --- what is received --------------------------------------------------------------------------


def settled(payload: bytes) -> tuple[int, bool]:
    """Return what a confirmation confirms, or refuses: a tag, and whether all before it too."""
    _, tag, flags = _SETTLED.unpack_from(payload)
    return tag, bool(flags & _ALL_BEFORE)


def origin(payload: bytes) -> Origin:
    """Read the method of a delivery, or of what was got."""
    at = _KIND_SIZE
    if kind_of(payload) == DELIVER:
        at += 1 + payload[at]  # the consumer's tag is first
    (tag,) = _TAG.unpack_from(payload, at)
    exchange, after = _read_short(payload, at + _TAG.size + 1)
    key, _ = _read_short(payload, after)
    return Origin(tag, bool(payload[at + _TAG.size] & 1), exchange, key)


def returned(payload: bytes) -> str:
    """Say why, and from where, a message was returned."""
    reason, after = _read_short(payload, _KIND_SIZE + 2)
    exchange, after = _read_short(payload, after)
    key, _ = _read_short(payload, after)
    return f"{reason} at exchange '{exchange}' for '{key}'"


def properties(payload: bytes) -> commands.Basic.Properties:
    """Read the properties in a content's header; none where they cannot be read.

    They may be anyone's, and none of them is needed: whoever takes the message says what is wrong
    with it, if anything is.
    """
    header = ContentHeader()
    try:
        header.unmarshal(payload)
    except (ValueError, OverflowError, OSError, RecursionError):
        return commands.Basic.Properties()
    return header.properties


def _read_short(payload: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + payload[at]
    return payload[at + 1 : end].decode(errors="replace"), end
