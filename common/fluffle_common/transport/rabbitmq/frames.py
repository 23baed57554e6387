"""The frames of AMQP 0-9-1 that carry contents, and those that settle them, as bytes.

What is published here many times a round has an encoding of its own, of just the types that are
used. What is received is taken apart only as far as somebody asks: a delivery's properties are read
by ``pamqp``, and most are never read.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pamqp import commands
from pamqp.header import ContentHeader

from fluffle_common.transport.base import Body

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
# Of the class Connection, on channel 0: the broker takes nothing that is published, or does again.
CLOSE, BLOCKED, UNBLOCKED = (struct.pack(">HH", 10, number) for number in (50, 60, 61))

_SIZE_AT = _KIND_SIZE  # in the payload of a content's header, after class and weight
_SIZE, _TAG = struct.Struct(">Q"), struct.Struct(">Q")
_SETTLED = struct.Struct(">4sQB")
_HEAD = struct.Struct(">HHQH")  # of a content's header: class, weight, size of the body, flags
_ALL_BEFORE, _REQUEUE = 1, 2
_MANDATORY = 1

# The properties that our messages have, as flags, in the order in which they follow.
_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 13, 1 << 12
_MESSAGE_ID, _TIMESTAMP, _TYPE, _USER_ID = 1 << 7, 1 << 6, 1 << 5, 1 << 4
_ALWAYS = _CONTENT_TYPE | _HEADERS | _DELIVERY_MODE | _TIMESTAMP | _TYPE | _USER_ID
_TRANSIENT, _PERSISTENT = b"\x01", b"\x02"
_LONG, _INTEGER, _FLOAT = struct.Struct(">I"), struct.Struct(">cq"), struct.Struct(">cd")

Value = str | int | float | bool | Sequence[str]


class Origin(NamedTuple):
    """What a delivery's method says besides its tag: whether it came before, and where from."""

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
    properties = [
        b"",  # the fixed part: its flags are known at the end
        _CONTENT_TYPE_VALUE,
        _table(headers),
        _PERSISTENT if durable else _TRANSIENT,
        _short(message_id) if message_id else b"",
        _TAG.pack(int(time.time())),
        _short(kind),
        _short(user),
    ]
    flags = _ALWAYS | _MESSAGE_ID if message_id else _ALWAYS
    properties[0] = _HEAD.pack(_BASIC, 0, size, flags)
    return _publish_method(channel, exchange, key) + frame(HEADER, channel, b"".join(properties))


@functools.lru_cache(1024)
def _publish_method(channel: int, exchange: str, key: str) -> bytes:
    method = [_PUBLISH, b"\0\0", _short(exchange), _short(key), bytes([_MANDATORY])]
    return frame(METHOD, channel, b"".join(method))


def bodies(channel: int, body: Body, frame_max: int) -> list[Body]:
    """Return the pieces that make up the frames of a body, which is not copied."""
    room = frame_max - FRAME.size - len(END)
    pieces: list[Body] = []
    for start in range(0, len(body), room):
        piece = body if len(body) <= room else memoryview(body)[start : start + room]
        pieces += (FRAME.pack(BODY, channel, len(piece)), piece, END)
    return pieces


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


_CONTENT_TYPE_VALUE = _short("application/msgpack")


@functools.lru_cache(1024)
def _string(text: str) -> bytes:
    return b"S" + _long(text.encode())


def _long(data: bytes) -> bytes:
    return _LONG.pack(len(data)) + data


def _table(values: Mapping[str, Value]) -> bytes:
    pieces = []
    for name, value in values.items():
        pieces += [_short(name), _value(value)]
    return _long(b"".join(pieces))


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return b"t\1" if value else b"t\0"
    if isinstance(value, int):
        return _INTEGER.pack(b"l", value)
    if isinstance(value, float):
        return _FLOAT.pack(b"d", value)
    return b"A" + _long(b"".join([_value(one) for one in value]))


# --- what is received --------------------------------------------------------------------------


def settled(payload: bytes) -> tuple[int, bool]:
    """Return what a confirmation confirms, or refuses: a tag, and whether all before it too."""
    _, tag, flags = _SETTLED.unpack_from(payload)
    return tag, bool(flags & _ALL_BEFORE)


def tag(payload: bytes) -> int:
    """Return what the delivery of this method, or what was got with it, is settled by."""
    found: int = _TAG.unpack_from(payload, _tag_at(payload))[0]
    return found


def origin(payload: bytes) -> Origin:
    """Read the rest of such a method."""
    at = _tag_at(payload) + _TAG.size
    exchange, after = _read_short(payload, at + 1)
    key, _ = _read_short(payload, after)
    return Origin(bool(payload[at] & 1), exchange, key)


def _tag_at(payload: bytes) -> int:
    if kind_of(payload) == DELIVER:
        return _KIND_SIZE + 1 + payload[_KIND_SIZE]  # the consumer's tag is first
    return _KIND_SIZE


def returned(payload: bytes) -> str:
    """Say why, and from where, a message was returned."""
    reason, after = _read_short(payload, _KIND_SIZE + 2)
    exchange, after = _read_short(payload, after)
    key, _ = _read_short(payload, after)
    return f"{reason} at exchange '{exchange}' for '{key}'"


def closed(payload: bytes) -> tuple[int, str]:
    """Return the code and the text with which a connection is closed, from ``CLOSE``."""
    code = int.from_bytes(payload[_KIND_SIZE : _KIND_SIZE + 2], "big")
    return code, _read_short(payload, _KIND_SIZE + 2)[0]


def blocked(payload: bytes) -> str | None:
    """Return why the broker takes nothing, from ``BLOCKED``; None from ``UNBLOCKED``."""
    if kind_of(payload) == UNBLOCKED:
        return None
    return _read_short(payload, _KIND_SIZE)[0] or "it does not say why"


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
