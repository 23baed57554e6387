"""Transfers: payloads that are too large for one message and travel in parts.

The sender splits the payload and announces a digest, the hash of the hashes of the parts. The
receiver hashes each part when it arrives, in any order; it ignores a duplicate, such as a part that
the broker redelivers. When all parts have arrived, it compares the hash of their hashes with the
announced digest.
"""

from __future__ import annotations

import itertools
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import wire_format
from fluffle_common.protocol.messages import Part, Transfer, WithTensors
from fluffle_common.tensors.digest import blake3_of
from fluffle_common.tensors.groups import NO_GROUPS, GroupedLayout, Groups, groups_of
from fluffle_common.tensors.layout import Weights
from fluffle_common.tensors.table import TensorEntry

MAX_MODEL_BYTES = 8 * 2**30
"""The largest payload of a transfer: a model, or an update of one."""
_MAX_PADDING_BYTES = 4096  # between two tensors: other implementations may align to pages


def fits(pieces: list[memoryview]) -> bool:
    """Whether a payload, which consists of these pieces, travels in its message itself."""
    return sum(map(len, pieces)) <= wire_format.PART_BYTES


class Outgoing:
    """An outgoing transfer, and the message that announces it.

    ``table`` and ``pieces`` are the tensors of the payload, from ``wire_format.lay_out``.
    """

    def __init__(
        self, message: WithTensors, table: tuple[TensorEntry, ...], pieces: list[memoryview]
    ) -> None:
        self._message, self._table, self._pieces = message, table, pieces
        self._nbytes = sum(map(len, pieces))
        self.parts = -(-self._nbytes // wire_format.PART_BYTES)
        self.id = uuid.uuid4().hex

    def body(self, digest: str) -> bytes:
        """Return the encoded message, which announces the parts with their ``digest``."""
        announced = {"transfer": self.transfer(digest)}
        return wire_format.encode(self._message.model_copy(update=announced), table=self._table)

    def transfer(self, digest: str) -> Transfer:
        """Return the announcement of the parts."""
        return Transfer(id=self.id, parts=self.parts, nbytes=self._nbytes, digest=digest)

    def bodies(self, first: int = 0, until: int | None = None) -> Iterator[bytes]:
        """Yield the encoded parts from ``first`` to before ``until``, each when it is requested."""
        for number, pieces in itertools.islice(enumerate(_split(self._pieces)), first, until):
            part = Part(federation=self._message.federation, transfer=self.id, part=number)
            yield wire_format.encode(part, pieces)

    def digest(self) -> str:
        """Return the digest of the parts; the hashing releases the GIL."""
        return _digest(self._pieces)


def pack(
    message: WithTensors, weights: Weights, others: Groups = NO_GROUPS
) -> tuple[Transfer | None, bytes, Iterator[bytes]]:
    """Encode a message with tensors.

    Returns:
        The transfer, the encoded message, and an iterator of the encoded parts. If the payload fits
        into the message, the transfer is None and there are no parts.

    Raises:
        ValueError: if a tensor has an unsupported dtype.
    """
    table, pieces = wire_format.lay_out(weights, others)
    if fits(pieces):
        return None, wire_format.encode(message, pieces, table), iter(())
    outgoing = Outgoing(message, table, pieces)
    digest = outgoing.digest()
    return outgoing.transfer(digest), outgoing.body(digest), outgoing.bodies()


def digest_of(weights: Weights, others: Groups = NO_GROUPS) -> str:
    """Return the digest of tensors that travel in parts."""
    return _digest(wire_format.lay_out(weights, others)[1])


def _split(pieces: list[memoryview]) -> Iterator[list[memoryview]]:
    """Split a payload into parts without copying it."""
    room, part = wire_format.PART_BYTES, []
    for piece in pieces:
        rest = piece
        while len(rest):
            part.append(rest[:room])
            rest = rest[room:]
            room -= len(part[-1])
            if not room:
                yield part
                room, part = wire_format.PART_BYTES, []
    if part:
        yield part


def _digest(pieces: list[memoryview]) -> str:
    return digest_of_parts(map(blake3_of, _split(pieces)))


def digest_of_parts(hashes: Iterable[bytes]) -> str:
    """Return the digest of a transfer from the BLAKE3 hashes of its parts, in order."""
    return blake3_of(hashes).hex()


def announced_layout(message: WithTensors) -> GroupedLayout:
    """Return the layout of an announced payload, before any part of it is fetched.

    Raises:
        MalformedMessage: with the cause ``tensors`` if the table does not match the transfer.
    """
    assert message.transfer is not None
    nbytes = message.transfer.nbytes
    try:
        layout = groups_of(message.tensors)
    except ValueError as error:
        raise MalformedMessage(str(error), "tensors") from None
    if layout.nbytes != nbytes:
        raise MalformedMessage(
            f"the announced transfer has {nbytes} bytes, but its tensors end at byte "
            f"{layout.nbytes}",
            "tensors",
        )
    max_bytes = sum(entry.nbytes + _MAX_PADDING_BYTES for entry in message.tensors)
    if nbytes > max_bytes:
        raise MalformedMessage(
            f"the announced transfer is too large: {nbytes} bytes, but its tensors need at most "
            f"{max_bytes}",
            "tensors",
        )
    return layout


class Incoming(ABC):
    """An incoming transfer; subclasses store the parts.

    Raises:
        MalformedMessage: if the announced size is too large, or the number of parts does not match.
    """

    def __init__(self, transfer: Transfer) -> None:
        if transfer.nbytes > MAX_MODEL_BYTES:
            raise MalformedMessage(
                f"the announced transfer is too large: {transfer.nbytes} bytes; the limit is "
                f"{MAX_MODEL_BYTES}"
            )
        if transfer.parts != -(-transfer.nbytes // wire_format.PART_BYTES):
            raise MalformedMessage(
                f"the announced transfer is inconsistent: {transfer.parts} parts of "
                f"{wire_format.PART_BYTES} bytes cannot hold {transfer.nbytes} bytes"
            )
        self.transfer = transfer
        self._missing = set(range(transfer.parts))
        self._hashes: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        """Whether all parts have arrived."""
        return not self._missing

    @property
    def done_parts(self) -> int:
        """The number of parts that have arrived."""
        return self.transfer.parts - len(self._missing)

    def add(self, part: Part, payload: memoryview) -> None:
        """Hash and store a part, ignoring duplicates and parts of other transfers.

        This takes a millisecond or two, during most of which the GIL is released.

        Raises:
            MalformedMessage: if the part has the wrong size.
        """
        number = part.part
        if part.transfer != self.transfer.id or number not in self._missing:
            return
        start = number * wire_format.PART_BYTES
        last = number == self.transfer.parts - 1
        expected = self.transfer.nbytes - start if last else wire_format.PART_BYTES
        if len(payload) != expected:
            raise MalformedMessage(
                f"part {number} has {len(payload)} bytes, but {expected} were announced"
            )
        if self.transfer.digest is not None:
            # Hashing takes half as long while the part is still in the processor's cache.
            self._hashes[number] = blake3_of([payload])
        self._store(start, payload)
        self._missing.discard(number)

    @abstractmethod
    def _store(self, start: int, payload: memoryview) -> None:
        """Store the bytes that begin at offset ``start`` of the transfer."""

    def check_digest(self) -> None:
        """Compare the digest of a complete transfer with the announced one, if there is one.

        Raises:
            MalformedMessage: with the cause ``tensors`` if they differ.
        """
        assert self.complete
        if self.transfer.digest is None:
            return
        digest = digest_of_parts(self._hashes[part] for part in range(self.transfer.parts))
        if digest != self.transfer.digest:
            raise MalformedMessage(
                f"the received parts have the digest {digest}, but {self.transfer.digest} was "
                "announced; some parts were replaced or damaged in transit",
                "tensors",
            )


class Assembly(Incoming):
    """A transfer that is assembled in memory.

    Raises:
        MalformedMessage: also if there is not enough memory.
    """

    def __init__(self, transfer: Transfer) -> None:
        super().__init__(transfer)
        try:
            # Reserves addresses only: the system provides each page when it is first written.
            self._buffer = np.empty(transfer.nbytes, np.uint8)
        except MemoryError:
            raise MalformedMessage(
                f"not enough memory for a transfer of {transfer.nbytes} bytes"
            ) from None

    def _store(self, start: int, payload: memoryview) -> None:
        self._buffer[start : start + len(payload)] = np.frombuffer(payload, np.uint8)

    def payload(self) -> memoryview:
        """Return the complete payload, read-only.

        Raises:
            MalformedMessage: with the cause ``tensors`` if the digest is not the announced one.
        """
        self.check_digest()
        return self._buffer.data.toreadonly()
