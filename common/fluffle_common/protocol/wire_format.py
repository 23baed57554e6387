"""Encoding and decoding of messages.

A body is one msgpack document, the array ``[header, payload]``: a map, and one ``bin`` that holds
all tensors, little-endian, each at a multiple of 64 bytes. Because the payload comes last, it can
be read as a memoryview without a copy. Because the header is padded, the payload starts at a
multiple of 64 bytes of the body.

Bodies are untrusted input. Decoding never allocates memory for a size that a header merely claims,
and every fault raises ``MalformedMessage``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgpack

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import (
    MAX_ID,
    PROTOCOL,
    WORKER_PATTERN,
    Message,
    Refusal,
    TensorHeader,
    parse,
    present_fields,
)
from fluffle_common.tensors.groups import NO_GROUPS, Groups, groups_of, shifted
from fluffle_common.tensors.layout import (
    ALIGNMENT,
    Layout,
    Tensors,
    Weights,
    as_maps,
    bytes_of,
    layout_for,
)
from fluffle_common.tensors.table import MAX_TENSORS, MODEL, TensorEntry

MAX_HEADER_BYTES = 16 * 2**20
"""Limit for any header; enough for ``MAX_TENSORS`` tensors with names of ordinary length."""
SMALL_HEADER_BYTES = 64 * 2**10
"""Limit for a header without a table of tensors."""
PART_BYTES = 4 * 2**20
"""A larger payload travels in parts of this size.

RabbitMQ 4 refuses messages above 16 MiB, and small parts bound the memory of both sides and of the
broker.
"""

_AMQP_HEADERS = ("round", "worker", "num_examples", "part")
_FEED_BYTES = 8 * 2**10
_ENTRY_BYTES = 100  # of a table entry without its name and shape: keys and three numbers
_ARRAY_OF_TWO = b"\x92"
_BIN = {0xC4: struct.Struct(">B"), 0xC5: struct.Struct(">H"), 0xC6: struct.Struct(">I")}
_BIN32 = struct.Struct(">BI")


def encode(
    message: Message,
    payload: bytes | memoryview | list[memoryview] = b"",
    table: tuple[TensorEntry, ...] | None = None,
) -> bytes:
    """Encode a message and its payload as one body, copying the payload once.

    ``payload`` may be a list of the pieces of which it consists (see ``lay_out``). ``table`` has
    the tensors in it, if they are not those of ``message.tensors``.
    """
    pieces = payload if isinstance(payload, list) else [payload]
    nbytes = sum(map(len, pieces))
    header = message.model_dump(exclude={"pad", "tensors"}, exclude_none=True)
    if isinstance(message, TensorHeader):
        header["tensors"] = as_maps(message.tensors if table is None else table)
    if nbytes:
        header["pad"] = b""  # comes last, so that the last byte is its length
    # Paths and errors can have text that is not valid UTF-8.
    packed: bytes = msgpack.packb(header, unicode_errors="backslashreplace")
    if nbytes:
        fill = -(len(_ARRAY_OF_TWO) + len(packed) + _BIN32.size) % ALIGNMENT
        packed = packed[:-1] + bytes([fill]) + bytes(fill)
    return b"".join([_ARRAY_OF_TWO, packed, _BIN32.pack(0xC6, nbytes), *pieces])


def decode(
    body: bytes | memoryview, federation: str | None = None, *, max_header: int = MAX_HEADER_BYTES
) -> tuple[Message, memoryview]:
    """Decode a body into its message and its payload, which is a view into ``body``.

    The message must belong to ``federation``; None accepts any. The decoder reads at most
    ``max_header`` bytes of the header.

    Raises:
        MalformedMessage: if the body is not exactly one valid document.
    """
    if body[:1] != _ARRAY_OF_TWO:
        raise MalformedMessage("the body is not a msgpack array of [header, payload]")
    view = memoryview(body)
    header, end = _unpack_header(view[1:], max_header)
    if not isinstance(header, dict):
        raise MalformedMessage(
            f"expected the header to be a map, but its type is {type(header).__name__}"
        )
    message = parse(header)
    if federation is not None and message.federation != federation:
        raise MalformedMessage(
            f"the message belongs to federation {message.federation}, not to {federation}"
        )
    return message, _payload_from(view, 1 + end)


class MinimalHello(NamedTuple):
    """The fields of a hello that are the same in all protocol versions; enough to refuse it.

    Later versions may have other fields, so ``decode`` may reject their hellos.
    """

    protocol: int
    worker: str
    session: str


def minimal_hello(body: bytes | memoryview, federation: str) -> MinimalHello | None:
    """Return the fields of a hello that ``decode`` rejected; None if it is not a usable hello."""
    try:
        header, _ = _unpack_header(memoryview(body)[1:], SMALL_HEADER_BYTES)
    except MalformedMessage:
        return None
    if not isinstance(header, dict) or header.get("kind") != "hello":
        return None
    protocol, worker, session = map(header.get, ("protocol", "worker", "session"))
    if type(protocol) is not int or header.get("federation") != federation:
        return None
    if not isinstance(worker, str) or not re.fullmatch(WORKER_PATTERN, worker):
        return None
    if not isinstance(session, str) or not 1 <= len(session) <= MAX_ID:
        return None
    return MinimalHello(protocol, worker, session)


def encode_refusal(refusal: Refusal, protocol: int) -> bytes:
    """Encode a refusal in the protocol version of the refused worker.

    In another version than ours, it has only the fields that are the same in all versions.
    """
    if protocol == PROTOCOL:
        return encode(refusal)
    fields = present_fields(refusal, ("federation", "kind", "session", "reason"))
    packed: bytes = msgpack.packb({"protocol": protocol, **fields})
    return b"".join([_ARRAY_OF_TWO, packed, _BIN32.pack(0xC6, 0)])


def header_room(tensors: Iterable[tuple[str, Sequence[int]]]) -> int:
    """Return the header limit of a message whose tensors have these names and shapes.

    The limit allows twice the size of the table, because a codec turns one tensor into up to two.
    """
    table = sum(_ENTRY_BYTES + len(name.encode()) + 9 * len(shape) for name, shape in tensors)
    return min(SMALL_HEADER_BYTES + 2 * table, MAX_HEADER_BYTES)


def _unpack_header(body: memoryview, max_bytes: int) -> tuple[Any, int]:
    """Unpack the first msgpack object of ``body``; return it and its length in bytes."""
    view = body[:max_bytes]
    unpacker = msgpack.Unpacker(
        max_buffer_size=max(max_bytes, 1),
        max_array_len=MAX_TENSORS,  # msgpack before 1.2 allocates the length that is claimed
        max_map_len=MAX_TENSORS,
        max_ext_len=0,
        strict_map_key=True,
        raw=False,
    )
    fed, step = 0, _FEED_BYTES
    while True:
        try:
            # feed() copies. Small steps avoid copying the payload that follows the header.
            unpacker.feed(view[fed : fed + step])
            fed, step = min(fed + step, len(view)), 2 * step
            return unpacker.unpack(), unpacker.tell()
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            if isinstance(error, msgpack.OutOfData) and fed < len(view):
                continue
            if isinstance(error, msgpack.OutOfData) and len(body) > max_bytes:
                raise MalformedMessage(f"the header has more than {max_bytes} bytes") from None
            reason = str(error) or type(error).__name__
            raise MalformedMessage(f"the header is not valid msgpack: {reason}"[:500]) from None


def _payload_from(view: memoryview, start: int) -> memoryview:
    size = _BIN.get(view[start]) if start < len(view) else None
    if size is None:
        raise MalformedMessage("the payload is missing, or is not a msgpack bin")
    begin = start + 1 + size.size
    if len(view) < begin:
        raise MalformedMessage("the body ends in the middle of the payload's length field")
    (claimed,) = size.unpack_from(view, start + 1)
    payload = view[begin:]
    if claimed != len(payload):
        raise MalformedMessage(f"the payload should have {claimed} bytes, but has {len(payload)}")
    return payload


def lay_out(
    weights: Weights, others: Groups = NO_GROUPS
) -> tuple[tuple[TensorEntry, ...], list[memoryview]]:
    """Lay out tensors in a payload.

    ``weights`` is the group ``model``. The other groups follow; empty ones are left out.

    Returns:
        The tensor table, and the pieces of the payload: views of the arrays, and padding between
        them. Arrays that are little-endian and C-contiguous are not copied.

    Raises:
        ValueError: if a tensor has an unsupported dtype.
    """
    layout = layout_for(weights)
    table, pieces, end = layout.table, _pieces(layout, weights), layout.nbytes
    for group, tensors in others.items():
        if not tensors:
            continue
        layout = layout_for(tensors)
        start = end + -end % ALIGNMENT
        if start > end:
            pieces.append(memoryview(bytes(start - end)))
        table += shifted(layout.table, start, group)
        pieces += _pieces(layout, tensors)
        end = start + layout.nbytes
    return table, pieces


def _pieces(layout: Layout, tensors: Weights) -> list[memoryview]:
    if isinstance(tensors, Tensors) and tensors.memory is not None:
        return [tensors.memory]
    pieces: list[memoryview] = []
    end = 0
    for entry, tensor in zip(layout.table, tensors.values(), strict=True):
        if entry.offset > end:
            pieces.append(memoryview(bytes(entry.offset - end)))
        if entry.nbytes:
            pieces.append(bytes_of(tensor))
        end = entry.offset + entry.nbytes
    return pieces


def read_groups(table: tuple[TensorEntry, ...], payload: memoryview) -> dict[str, Tensors]:
    """Return the tensors of each group as read-only views into the payload.

    The group ``model`` is always there, though it may be empty.

    Raises:
        MalformedMessage: with the cause ``tensors`` if the table is invalid or does not match the
            payload.
    """
    try:
        return groups_of(table).over(payload)
    except ValueError as error:
        raise MalformedMessage(str(error), "tensors") from None


def read_tensors(table: tuple[TensorEntry, ...], payload: memoryview) -> Tensors:
    """Return the tensors of the group ``model``; raises what ``read_groups`` raises."""
    return read_groups(table, payload)[MODEL]


def describe(message: Message) -> dict[str, Any]:
    """Return the AMQP headers that describe a message in RabbitMQ's management UI."""
    return present_fields(message, _AMQP_HEADERS)
