"""How much of what was received may wait in memory to be folded.

A broker bounds what it delivers in number, not in bytes. And the number cannot be small: an update
stays unacknowledged until its round is on disk, so that a round of many workers needs as many, or
it would wait for updates that the broker does not deliver before others are acknowledged.

So the number is the operator's (``max_workers``), and the bytes are bounded here: what comes while
too much waits already keeps its place and loses its body; when there is room, it is given back to
the broker, which delivers it again. An update that is folded has no body any more, and takes none
of the room.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fluffle_common.protocol.messages import FirstWeights, Update
from fluffle_common.transport.base import Delivery
from fluffle_coordinator.machine.effects import Fold


@dataclass(eq=False)
class Held:
    """A delivery that carries tensors, with what is needed to use it and then let go of it."""

    delivery: Delivery
    message: Update | FirstWeights
    payload: memoryview
    room: Room | None = None
    how: Fold | None = None  # how it is to be added to the sum
    into: int = 0  # of this round
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Take room for it."""
        self.size_bytes = len(self.delivery.body)
        if self.room is not None:
            self.room.used_bytes += self.size_bytes

    def forget(self) -> None:
        """Let go of the bytes; the delivery stays ours."""
        self.payload = memoryview(b"")
        self.delivery.body = b""
        self.free()

    def free(self) -> None:
        """Take no room any more."""
        if self.room is not None:
            self.room.freed(self.size_bytes)
            self.room = None


class Room:
    """The room for what waits.

    Args:
        most_bytes: how much of it there is; one message is taken in any case.
    """

    def __init__(self, most_bytes: int) -> None:
        self.used_bytes = 0
        self._most_bytes = most_bytes
        self._parked: deque[tuple[Delivery, int]] = deque()

    def park(self, delivery: Delivery) -> bool:
        """Keep a delivery without its body where there is no room for it; return whether so."""
        size_bytes = len(delivery.body)
        if not self.used_bytes or self.used_bytes + size_bytes <= self._most_bytes:
            return False
        delivery.body = b""
        self._parked.append((delivery, size_bytes))
        return True

    def freed(self, size_bytes: int) -> None:
        """Note that something waits no more; let as much be delivered again as there is room."""
        self.used_bytes -= size_bytes
        room = self._most_bytes - self.used_bytes
        while self._parked and (self._parked[0][1] <= room or not self.used_bytes):
            delivery, needed = self._parked.popleft()
            room -= needed
            delivery.release()
            if room < 0:
                break

    def link_lost(self) -> None:
        """Forget what is parked: all of it will be delivered again over another link."""
        self._parked.clear()
