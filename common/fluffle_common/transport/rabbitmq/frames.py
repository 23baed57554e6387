"""Encoding and decoding of the AMQP 0-9-1 frames that carry or settle messages.

Publishing happens many times per round, so it has its own encoder for just the types that are used.
Received frames are decoded on demand: ``pamqp`` decodes a delivery's properties, most of which are
never read.
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
FRAME = struct.Struct(">BHI")  # type, channel, size; the payload and the end byte follow
HEARTBEAT_FRAME = FRAME.pack(HEARTBEAT, 0, 0) + END

# The first four bytes of a method's payload: the class (Basic) and the method's number.
_BASIC = 60
_PUBLISH, RETURN, DELIVER, _GET, GET_OK, GET_EMPTY, ACK, NACK = (
    struct.pack(">HH", _BASIC, number) for number in (40, 50, 60, 70, 71, 72, 80, 120)
)
_KIND_SIZE = 4
CHANNEL_CLOSE = struct.pack(">HH", 20, 40)
# Methods of the class Connection, on channel 0.
CLOSE, BLOCKED, UNBLOCKED = (struct.pack(">HH", 10, number) for number in (50, 60, 61))

_SIZE_AT = _KIND_SIZE  # the offset of the body size in a header frame, after class and weight
_SIZE, _TAG = struct.Struct(">Q"), struct.Struct(">Q")
_SETTLED = struct.Struct(">4sQB")
_HEAD = struct.Struct(">HHQH")  # of a header frame: class, weight, body size, flags
NO_PROPERTIES = _HEAD.pack(_BASIC, 0, 0, 0)  # the payload of a header frame without properties
_MULTIPLE, _REQUEUE = 1, 2
_MANDATORY = 1

# The flags of the properties that we send, in the order in which the values follow.
_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 13, 1 << 12
_MESSAGE_ID, _TIMESTAMP, _TYPE, _USER_ID = 1 << 7, 1 << 6, 1 << 5, 1 << 4
_ALWAYS = _CONTENT_TYPE | _HEADERS | _DELIVERY_MODE | _TIMESTAMP | _TYPE | _USER_ID
_TRANSIENT, _PERSISTENT = b"\x01", b"\x02"
_LONG, _FLOAT = struct.Struct(">I"), struct.Struct(">cd")
_SMALL_INTEGER, _INTEGER = struct.Struct(">ci"), struct.Struct(">cq")

Value = str | int | float | bool | Sequence[str]


class Origin(NamedTuple):
    """The redelivered flag, exchange and routing key of a delivery."""

    redelivered: bool
    exchange: str
    key: str


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """Return a complete frame."""
    return FRAME.pack(kind, channel, len(payload)) + payload + END


def kind_of(payload: bytes) -> bytes:
    """Return a method's class and number, as encoded on the wire."""
    return payload[:_KIND_SIZE]


def body_size(payload: bytes) -> int:
    """Return the size of the body that follows a header frame."""
    size: int = _SIZE.unpack_from(payload, _SIZE_AT)[0]
    return size


# --- sending -----------------------------------------------------------------------------------


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
    """Return the method and header frames of a mandatory publish; names have at most 255 bytes."""
    properties = [
        b"",  # the fixed part, which is filled in below
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
    """Return the pieces of a body's frames in order, without copying the body."""
    room = frame_max - FRAME.size - len(END)
    pieces: list[Body] = []
    for start in range(0, len(body), room):
        piece = body if len(body) <= room else memoryview(body)[start : start + room]
        pieces += (FRAME.pack(BODY, channel, len(piece)), piece, END)
    return pieces


def ack(channel: int, tag: int, *, multiple: bool) -> bytes:
    """Return the frame that acknowledges a delivery."""
    return frame(METHOD, channel, _SETTLED.pack(ACK, tag, _MULTIPLE if multiple else 0))


def requeue(channel: int, tag: int) -> bytes:
    """Return the frame that returns a delivery to its queue."""
    return frame(METHOD, channel, _SETTLED.pack(NACK, tag, _REQUEUE))


def get(channel: int, queue: str) -> bytes:
    """Return the frame that requests one message, with acknowledgement."""
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
        if -(2**31) <= value < 2**31:  # some AMQP clients, such as Perl's Net::AMQP, know no other
            return _SMALL_INTEGER.pack(b"I", value)
        return _INTEGER.pack(b"l", value)
    if isinstance(value, float):
        return _FLOAT.pack(b"d", value)
    return b"A" + _long(b"".join([_value(item) for item in value]))


# --- receiving ---------------------------------------------------------------------------------


def settlement(payload: bytes) -> tuple[int, bool]:
    """Return the tag in an ack or nack, and whether it covers all earlier tags as well."""
    _, tag, flags = _SETTLED.unpack_from(payload)
    return tag, bool(flags & _MULTIPLE)


def tag(payload: bytes) -> int:
    """Return the delivery tag in a ``DELIVER`` or ``GET_OK`` method."""
    number: int = _TAG.unpack_from(payload, _tag_at(payload))[0]
    return number


def origin(payload: bytes) -> Origin:
    """Return the origin in a ``DELIVER`` or ``GET_OK`` method."""
    at = _tag_at(payload) + _TAG.size
    exchange, after = _read_short(payload, at + 1)
    key, _ = _read_short(payload, after)
    return Origin(bool(payload[at] & 1), exchange, key)


def _tag_at(payload: bytes) -> int:
    if kind_of(payload) == DELIVER:
        return _KIND_SIZE + 1 + payload[_KIND_SIZE]  # after the consumer tag
    return _KIND_SIZE


def return_reason(payload: bytes) -> str:
    """Return the reason, the exchange and the key of a returned message in words."""
    reason, after = _read_short(payload, _KIND_SIZE + 2)
    exchange, after = _read_short(payload, after)
    key, _ = _read_short(payload, after)
    return f"{reason} at exchange '{exchange}' for the routing key '{key}'"


def close_reason(payload: bytes) -> tuple[int, str]:
    """Return the reply code and text in a ``CLOSE`` method."""
    code = int.from_bytes(payload[_KIND_SIZE : _KIND_SIZE + 2], "big")
    return code, _read_short(payload, _KIND_SIZE + 2)[0]


def blocked_reason(payload: bytes) -> str | None:
    """Return the reason in a ``BLOCKED`` method; None for ``UNBLOCKED``."""
    if kind_of(payload) == UNBLOCKED:
        return None
    return _read_short(payload, _KIND_SIZE)[0] or "the broker gives no reason"


def properties(payload: bytes) -> commands.Basic.Properties:
    """Return the properties in a header frame, or empty ones if they are malformed.

    Any client may have sent them, and none is required: the receiver of the message validates it.
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
