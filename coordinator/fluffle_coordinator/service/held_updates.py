"""Bounds the memory of the updates that were received but not folded yet.

The broker limits unacknowledged deliveries by number (prefetch), not by bytes. The number cannot be
small: updates stay unacknowledged until their round is on disk, so with a prefetch below the number
of workers, a round would wait for updates that the broker does not deliver.

So the prefetch follows ``max_workers``, and ``Room`` bounds the bytes. A delivery that does not fit
is *parked*: its body is dropped, and once there is room it is returned to the broker, which
delivers it again. A folded update has no body any more and uses no room, nor does a copy of it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fluffle_common.protocol.messages import FirstWeights, Update
from fluffle_common.transport.base import Delivery
from fluffle_coordinator.machine.effects import Fold
from fluffle_coordinator.machine.events import Arrived
from fluffle_coordinator.machine.records import Handle, Ticket


@dataclass(eq=False)
class Held:
    """An unacknowledged delivery with tensors, and the room that its body occupies.

    ``how`` and ``into`` are set when it is to be folded: the machine's effect, and the round.
    """

    delivery: Delivery
    message: Update | FirstWeights
    payload: memoryview
    room: Room | None = None
    how: Fold = field(init=False)
    into: int = 0
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Occupy room for the body."""
        self.size_bytes = len(self.delivery.body)
        if self.room is not None:
            self.room.used_bytes += self.size_bytes

    def arrived(self, now: float, handle: Handle) -> Arrived:
        """Return the event that an update arrived, which is held under this handle."""
        message, transfer = self.message, self.message.transfer
        assert isinstance(message, Update)
        return Arrived(
            now,
            message.run,
            handle,
            Ticket(message.worker, message.sequence or message.round),
            message.round,
            message.base,
            message.num_examples,
            message.seconds,
            len(self.payload) if transfer is None else transfer.nbytes,
        )

    def forget(self) -> None:
        """Drop the body and free its room; the delivery stays unacknowledged."""
        self.payload = memoryview(b"")
        self.delivery.body = b""
        self.free()

    def free(self) -> None:
        """Free the room; a second call does nothing."""
        if self.room is not None:
            self.room.freed(self.size_bytes)
            self.room = None


class Room:
    """A budget of bytes for the bodies of held updates.

    A single message above ``most_bytes`` is admitted while nothing else is held.
    """

    def __init__(self, most_bytes: int) -> None:
        self.used_bytes = 0
        self._most_bytes = most_bytes
        self._parked: deque[tuple[Delivery, int]] = deque()

    def park(self, delivery: Delivery) -> bool:
        """Park a delivery if there is no room for its body; return whether it was parked."""
        size_bytes = len(delivery.body)
        if not self.used_bytes or self.used_bytes + size_bytes <= self._most_bytes:
            return False
        delivery.body = b""
        self._parked.append((delivery, size_bytes))
        return True

    def freed(self, size_bytes: int) -> None:
        """Return bytes to the budget, for parked deliveries."""
        self.used_bytes -= size_bytes
        self.unpark()

    def unpark(self) -> None:
        """Give parked deliveries that fit back to the broker."""
        room = self._most_bytes - self.used_bytes
        while self._parked and (self._parked[0][1] <= room or not self.used_bytes):
            delivery, needed = self._parked.popleft()
            room -= needed
            delivery.release()
            if room < 0:
                break

    def link_lost(self) -> None:
        """Forget parked deliveries, because the broker delivers them again over the next link."""
        self._parked.clear()
