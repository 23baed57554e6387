"""The receiving side of a transfer: parts are verified as they arrive, in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import codec
from fluffle_common.protocol.messages import Part, Transfer
from fluffle_common.tensors.digest import blake3_of


class Incoming(ABC):
    """An incoming transfer; subclasses store the parts.

    Args:
        transfer: the announcement.
        max_bytes: the maximum size that is accepted.

    Raises:
        MalformedMessage: if the announced size exceeds ``max_bytes``, or the number of parts does
            not match it.
    """

    def __init__(self, transfer: Transfer, max_bytes: int) -> None:
        if transfer.nbytes > max_bytes:
            raise MalformedMessage(
                f"a transfer of {transfer.nbytes} bytes is announced; the limit is {max_bytes}"
            )
        if transfer.parts != -(-transfer.nbytes // codec.PART_BYTES):
            raise MalformedMessage(
                f"{transfer.parts} parts of {codec.PART_BYTES} bytes cannot hold "
                f"{transfer.nbytes} bytes"
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
        start = number * codec.PART_BYTES
        last = number == self.transfer.parts - 1
        expected = self.transfer.nbytes - start if last else codec.PART_BYTES
        if len(payload) != expected:
            raise MalformedMessage(
                f"part {number} has {len(payload)} bytes, {expected} were announced"
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
        digest = codec.digest_of_parts(self._hashes[part] for part in range(self.transfer.parts))
        if digest != self.transfer.digest:
            raise MalformedMessage(
                f"the parts have the digest {digest}, {self.transfer.digest} was announced: "
                "some were replaced or damaged on their way",
                "tensors",
            )


class Assembly(Incoming):
    """A transfer that is assembled in memory; the arguments are those of ``Incoming``.

    Raises:
        MalformedMessage: also if there is not enough memory.
    """

    def __init__(self, transfer: Transfer, max_bytes: int) -> None:
        super().__init__(transfer, max_bytes)
        try:
            # Reserves addresses only: the system provides each page when it is first written.
            self._buffer = np.empty(transfer.nbytes, np.uint8)
        except MemoryError:
            raise MalformedMessage(f"there is no room for {transfer.nbytes} bytes") from None

    def _store(self, start: int, payload: memoryview) -> None:
        self._buffer[start : start + len(payload)] = np.frombuffer(payload, np.uint8)

    def payload(self) -> memoryview:
        """Return the complete payload, read-only.

        Raises:
            MalformedMessage: with the cause ``tensors`` if the digest is not the announced one.
        """
        self.check_digest()
        return self._buffer.data.toreadonly()
