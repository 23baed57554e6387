"""The parts of a transfer, checked as they come, in any order, each at most once."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import codec
from fluffle_common.protocol.messages import Part, Transfer
from fluffle_common.tensors.digest import blake3_of


class Incoming(ABC):
    """One transfer on its way in; a subclass says where its parts are kept.

    Args:
        transfer: what was announced.
        max_bytes: the most that may be announced.

    Raises:
        MalformedMessage: where more is announced than ``max_bytes``, or the number of parts does
            not go with the number of bytes.
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
        self._hashed: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        """Whether every part is there."""
        return not self._missing

    @property
    def done_parts(self) -> int:
        """How many parts are there."""
        return self.transfer.parts - len(self._missing)

    def add(self, part: Part, payload: memoryview) -> None:
        """Take one part; one that is there already, or belongs elsewhere, is passed over.

        It takes a millisecond or two, most of it outside of the GIL.

        Raises:
            MalformedMessage: where it has not the size that its number asks for.
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
            # At once, while it is in the processor's cache: elsewhere it takes twice the time.
            self._hashed[number] = blake3_of([payload])
        self._keep(start, payload)
        self._missing.discard(number)

    @abstractmethod
    def _keep(self, start: int, payload: memoryview) -> None:
        """Keep the bytes that begin at ``start`` of the transfer."""

    def check_digest(self) -> None:
        """Compare the digest of all parts, once they are there, with what was announced.

        Raises:
            MalformedMessage: of cause ``tensors``, where it is another.
        """
        assert self.complete
        if self.transfer.digest is None:
            return
        found = codec.digest_of_parts(self._hashed[part] for part in range(self.transfer.parts))
        if found != self.transfer.digest:
            raise MalformedMessage(
                f"the parts have the digest {found}, {self.transfer.digest} was announced: "
                "some were replaced or damaged on their way",
                "tensors",
            )


class Assembly(Incoming):
    """A transfer that is put together in one piece of memory; arguments as of ``Incoming``.

    Raises:
        MalformedMessage: also where there is no memory for it.
    """

    def __init__(self, transfer: Transfer, max_bytes: int) -> None:
        super().__init__(transfer, max_bytes)
        try:
            # Untouched pages cost nothing: an announcement alone takes addresses, no memory.
            self._whole = np.empty(transfer.nbytes, np.uint8)
        except MemoryError:
            raise MalformedMessage(f"there is no room for {transfer.nbytes} bytes") from None

    def _keep(self, start: int, payload: memoryview) -> None:
        self._whole[start : start + len(payload)] = np.frombuffer(payload, np.uint8)

    def payload(self) -> memoryview:
        """Return the payload, read-only, once it is complete.

        Raises:
            MalformedMessage: of cause ``tensors``, where it is not what was announced.
        """
        self.check_digest()
        return self._whole.data.toreadonly()
