"""Bytes to messages and back, bounded and checked.

A body is one msgpack document, the array ``[header, payload]``: a map and one ``bin`` that holds
every tensor, little-endian, each at a multiple of 64 bytes. Any msgpack library reads it. Because
the payload comes last, a reader takes it as a memoryview without copying it, and because the header
is padded, the payload itself starts at a multiple of 64 bytes of the body.

What arrives is hostile until checked here: nothing is allocated from a number in a header, and
whatever is wrong with it is a ``MalformedMessage`` that says so.
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import (
    MAX_ID,
    PROTOCOL,
    WORKER_PATTERN,
    Message,
    Part,
    Refusal,
    TensorHeader,
    Transfer,
    WithTensors,
    parse,
    present_fields,
)
from fluffle_common.tensors.digest import blake3_of
from fluffle_common.tensors.groups import NO_GROUPS, GroupedLayout, Groups, groups_of, placed
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

# Of any message; enough for as many tensors as there may be, with names of an ordinary length.
MAX_HEADER_BYTES = 16 * 2**20
# Of a message without a table of tensors.
SMALL_HEADER_BYTES = 64 * 2**10
# Between two tensors may lie as much as aligns the second one to a page.
_MOST_PADDING_BYTES = 4096
# A payload up to this size travels inside its message, a larger one in parts of this size: small
# enough that no broker refuses it (RabbitMQ 4 stops at 16 MiB) and that neither side nor the broker
# holds more than a few of them at a time.
PART_BYTES = 4 * 2**20

_TOLD = ("round", "worker", "num_examples", "part")
_APART = {"pad", "tensors"}
_HEADER_STEP = 8 * 2**10
# What an entry of a table takes besides its name and its shape: the keys, and three numbers.
_ENTRY_BYTES = 100
_ARRAY_OF_TWO = b"\x92"
_BIN = {0xC4: struct.Struct(">B"), 0xC5: struct.Struct(">H"), 0xC6: struct.Struct(">I")}
_BIN32 = struct.Struct(">BI")


def encode(
    message: Message,
    payload: bytes | memoryview | list[memoryview] = b"",
    table: tuple[TensorEntry, ...] | None = None,
) -> bytes:
    """Pack a message and its payload into one document.

    Args:
        message: the header.
        payload: the bytes behind it, or the pieces that make them up (see ``lay_out``).
        table: what is in the payload, where the message does not say it itself.

    Returns:
        The body, made with a single copy of the payload.
    """
    pieces = payload if isinstance(payload, list) else [payload]
    nbytes = sum(map(len, pieces))
    header = message.model_dump(exclude=_APART, exclude_none=True)
    if isinstance(message, TensorHeader):
        header["tensors"] = as_maps(message.tensors if table is None else table)
    if nbytes:
        header["pad"] = b""  # the last, so that it can be filled up behind its length
    packed: bytes = msgpack.packb(header)
    if nbytes:
        fill = -(len(_ARRAY_OF_TWO) + len(packed) + _BIN32.size) % ALIGNMENT
        packed = packed[:-1] + bytes([fill]) + bytes(fill)
    return b"".join([_ARRAY_OF_TWO, packed, _BIN32.pack(0xC6, nbytes), *pieces])


def decode(
    body: bytes | memoryview, federation: str | None = None, *, max_header: int = MAX_HEADER_BYTES
) -> tuple[Message, memoryview]:
    """Unpack a body into its message and its payload, a view into ``body``.

    Args:
        body: what was received.
        federation: the only one that the message may be of; None takes any.
        max_header: the most bytes that the header may have; no more of it are looked at.

    Raises:
        MalformedMessage: where the body is anything else than one whole, valid document.
    """
    if body[:1] != _ARRAY_OF_TWO:
        raise MalformedMessage("not a msgpack array of [header, payload]")
    view = memoryview(body)
    header, end = _header(view[1:], max_header)
    if not isinstance(header, dict):
        raise MalformedMessage(f"the header is a {type(header).__name__}, not a map")
    message = parse(header)
    if federation is not None and message.federation != federation:
        raise MalformedMessage(f"it belongs to federation {message.federation}")
    return message, _payload(view, 1 + end)


class Greeting(NamedTuple):
    """What stays the same in the hello of every version: enough to answer it."""

    protocol: int
    worker: str
    session: str


def greeting(body: bytes | memoryview, federation: str) -> Greeting | None:
    """Return who greets in a body that ``decode`` refused; None if it is no hello to answer."""
    try:
        header, _ = _header(memoryview(body)[1:], SMALL_HEADER_BYTES)
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
    return Greeting(protocol, worker, session)


def encode_refusal(refusal: Refusal, protocol: int) -> bytes:
    """Pack a refusal as version ``protocol`` reads it, of what stays the same in every version."""
    same = ("federation", "kind", "session", "reason")
    if protocol == PROTOCOL:
        return encode(refusal)
    packed: bytes = msgpack.packb({"protocol": protocol, **present_fields(refusal, same)})
    return b"".join([_ARRAY_OF_TWO, packed, _BIN32.pack(0xC6, 0)])


def header_room(tensors: Iterable[tuple[str, Sequence[int]]]) -> int:
    """Return how long the header of a message may be whose tensors have these names and shapes.

    Twice what its table needs, since an encoding makes two tensors of one.
    """
    table = sum(_ENTRY_BYTES + len(name.encode()) + 9 * len(shape) for name, shape in tensors)
    return min(SMALL_HEADER_BYTES + 2 * table, MAX_HEADER_BYTES)


def _header(whole: memoryview, most: int) -> tuple[Any, int]:
    """Unpack what ``whole`` begins with, up to ``most`` bytes; return it, and where it ends."""
    view = whole[:most]
    unpacker = msgpack.Unpacker(
        max_buffer_size=max(most, 1),
        max_array_len=MAX_TENSORS,  # what it claims, a msgpack before 1.2 allocates
        max_map_len=MAX_TENSORS,
        max_ext_len=0,
        strict_map_key=True,
        raw=False,
    )
    fed, step = 0, _HEADER_STEP
    while True:
        try:
            # What is fed is copied: so in steps, or the payload behind the header would be too.
            unpacker.feed(view[fed : fed + step])
            fed, step = min(fed + step, len(view)), 2 * step
            return unpacker.unpack(), unpacker.tell()
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as wrong:
            if isinstance(wrong, msgpack.OutOfData) and fed < len(view):
                continue
            if isinstance(wrong, msgpack.OutOfData) and len(whole) > most:
                raise MalformedMessage(f"the header has more than {most} bytes") from None
            told = str(wrong) or type(wrong).__name__
            raise MalformedMessage(f"the header is not valid msgpack: {told}"[:500]) from None


def _payload(view: memoryview, start: int) -> memoryview:
    size = _BIN.get(view[start]) if start < len(view) else None
    if size is None:
        raise MalformedMessage("the payload is missing, or is not a msgpack bin")
    begin = start + 1 + size.size
    if len(view) < begin:
        raise MalformedMessage("the body ends within the payload's length")
    (claimed,) = size.unpack_from(view, start + 1)
    payload = view[begin:]
    if claimed != len(payload):
        raise MalformedMessage(f"the payload claims {claimed} bytes, {len(payload)} are there")
    return payload


def lay_out(
    weights: Weights, beside: Groups = NO_GROUPS
) -> tuple[tuple[TensorEntry, ...], list[memoryview]]:
    """Lay tensors out one behind the other in a payload.

    Args:
        weights: the tensors of the model's group.
        beside: those of other groups, which follow; an empty group does not travel.

    Returns:
        The tensor table, and the pieces (views of the arrays, and padding between them) that
        joined make the payload. What is laid out already is one piece, and no array that is
        little-endian and C-contiguous is copied.

    Raises:
        ValueError: for a dtype that does not travel.
    """
    layout = layout_for(weights)
    table, pieces, end = layout.table, _pieces(layout, weights), layout.nbytes
    for group, tensors in beside.items():
        if not tensors:
            continue
        layout = layout_for(tensors)
        start = end + -end % ALIGNMENT
        if start > end:
            pieces.append(memoryview(bytes(start - end)))
        table += placed(layout, group, start)
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
    """Return the tensors of a table, group by group, as read-only views into the payload.

    The group of the model is there in any case, if only an empty one.

    Raises:
        MalformedMessage: of cause ``tensors``, where an entry is not what it says, or does not lie
            in the payload behind the entry before it.
    """
    try:
        return groups_of(table).over(payload)
    except ValueError as wrong:
        raise MalformedMessage(str(wrong), "tensors") from None


def read_tensors(table: tuple[TensorEntry, ...], payload: memoryview) -> Tensors:
    """Return the tensors of the model's group; see ``read_groups``."""
    return read_groups(table, payload)[MODEL]


class Packing:
    """A message that carries tensors, and its payload: in one piece or, where large, in parts.

    Args:
        message: the header, yet without its table of tensors.
        weights: the tensors of the model's group.
        beside: those of other groups.

    Raises:
        ValueError: for a dtype that does not travel.
    """

    def __init__(self, message: WithTensors, weights: Weights, beside: Groups = NO_GROUPS) -> None:
        self._message = message
        self._table, self._pieces = lay_out(weights, beside)
        self.nbytes = sum(map(len, self._pieces))
        fits = self.nbytes <= PART_BYTES
        self.parts = 0 if fits else -(-self.nbytes // PART_BYTES)
        self.id = uuid.uuid4().hex if self.parts else ""

    def body(self, digest: str | None = None) -> bytes:
        """Return the message's body; one whose payload is in parts announces their ``digest``."""
        if not self.parts:
            return encode(self._message, self._pieces, self._table)
        assert digest is not None
        transfer = Transfer(id=self.id, parts=self.parts, nbytes=self.nbytes, digest=digest)
        return encode(self._message.model_copy(update={"transfer": transfer}), table=self._table)

    def bodies(self) -> Iterator[bytes]:
        """Make the bodies of the parts, one at a time, as asked for."""
        if self.parts:
            for number, cut in enumerate(_cuts(self._pieces)):
                part = Part(federation=self._message.federation, transfer=self.id, part=number)
                yield encode(part, cut)

    def digest(self) -> str:
        """Return the digest of the parts; it takes its time, and does not hold up other threads."""
        return _digest(self._pieces)


def pack(
    message: WithTensors, weights: Weights, beside: Groups = NO_GROUPS
) -> tuple[Transfer | None, bytes, Iterator[bytes]]:
    """Pack a message that carries tensors.

    Returns:
        The transfer that it announces, its body, and the bodies of its parts: none of either where
        the payload fits into the message itself. Parts are made one at a time, as asked for.
    """
    packing = Packing(message, weights, beside)
    if not packing.parts:
        return None, packing.body(), iter(())
    body = packing.body(packing.digest())
    announced, _ = decode(body)
    assert isinstance(announced, WithTensors)
    return announced.transfer, body, packing.bodies()


def digest_of(weights: Weights, beside: Groups = NO_GROUPS) -> str:
    """Return the digest with which tensors travel, where they travel in parts."""
    return _digest(lay_out(weights, beside)[1])


def _cuts(pieces: list[memoryview]) -> Iterator[list[memoryview]]:
    """Cut a payload into parts, none of which is copied."""
    room, cut = PART_BYTES, []
    for piece in pieces:
        rest = piece
        while len(rest):
            cut.append(rest[:room])
            rest = rest[room:]
            room -= len(cut[-1])
            if not room:
                yield cut
                room, cut = PART_BYTES, []
    if cut:
        yield cut


def _digest(pieces: list[memoryview]) -> str:
    return digest_of_parts(map(blake3_of, _cuts(pieces)))


def digest_of_parts(hashes: Iterable[bytes]) -> str:
    """Return the digest of a transfer: that of the BLAKE3 of its parts, in their order."""
    return blake3_of(hashes).hex()


def announced(message: WithTensors) -> GroupedLayout:
    """Return how the tensors lie in a payload that is announced, before anything of it is fetched.

    Raises:
        MalformedMessage: of cause ``tensors``, where the table and the transfer do not go together.
    """
    assert message.transfer is not None
    nbytes = message.transfer.nbytes
    try:
        layout = groups_of(message.tensors)
    except ValueError as wrong:
        raise MalformedMessage(str(wrong), "tensors") from None
    if layout.nbytes != nbytes:
        raise MalformedMessage(
            f"its tensors end at byte {layout.nbytes}, a transfer of {nbytes} bytes is announced",
            "tensors",
        )
    needed = sum(entry.nbytes + _MOST_PADDING_BYTES for entry in message.tensors)
    if nbytes > needed:
        raise MalformedMessage(
            f"a transfer of {nbytes} bytes is announced, its tensors need no more than {needed}",
            "tensors",
        )
    return layout


def describe(message: Message) -> dict[str, Any]:
    """Return the headers that let RabbitMQ's own page tell the story of a message."""
    return present_fields(message, _TOLD)
