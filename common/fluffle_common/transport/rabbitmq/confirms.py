"""When a broker's confirmation is late: told by what moves, not by how fast a line should be.

A message that is on its way may take as long as it takes, while bytes of it leave. Once all of it
has left, or nothing leaves any more, its confirmation is late after a constant time.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# So long nothing may move.
_CONFIRM_S = 20.0
_LOOK_S = 1.0
# Where the system does not tell what the other end has, what it buffers needs time too.
_SLOWEST_BYTES_PER_S = 10_000

_QUEUED = struct.Struct("@i")


class Flow(Protocol):
    """What moves on one connection."""

    def waiting_bytes(self) -> int:
        """Return how many bytes the system has not taken from this process yet."""

    def queued_bytes(self) -> int | None:
        """Return how many bytes that the system has taken the other end has not acknowledged.

        None where the system does not tell.
        """

    def come_bytes(self) -> int:
        """Return how many bytes of messages have come in, which a confirmation may be behind.

        The number only grows.
        """


@dataclass(slots=True, eq=False)
class Awaited:
    """A message whose confirmation is yet to come.

    Args:
        nbytes: its size.
        ends_at: how many bytes will have left when all of it has.
        since: from when on nothing of it has moved, by the watch's own clock.
        left: whether all of it has left.
    """

    nbytes: int
    ends_at: int
    since: float
    left: bool = False


class ConfirmWatch:
    """Watches over what one channel has sent.

    Args:
        flow: what moves on the channel's connection.
        late: told why the connection is to be given up.
        blocked: whether the broker takes nothing for the moment; that time does not count.
    """

    def __init__(
        self, flow: Flow, late: Callable[[str], object], blocked: Callable[[], bool]
    ) -> None:
        self.under_way_bytes = 0
        self._flow, self._late, self._blocked = flow, late, blocked
        self._awaited: dict[Awaited, None] = {}
        self._sent = 0  # bytes, since nothing was awaited
        self._left, self._come = 0, 0  # at the last look
        self._moved_at = 0.0
        # Time in which this process did not run counts for nothing.
        self._clock_s, self._looked_at = 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def sending(self, nbytes: int) -> Awaited:
        """Note that so many bytes are sent now; to be called before they are."""
        if not self._awaited:
            self._sent = self._left = 0
        self._sent += nbytes
        self.under_way_bytes += nbytes
        one = Awaited(nbytes, self._sent, self._clock_s)
        self._awaited[one] = None
        if self._timer is None:
            self._look_later()
        return one

    def settled(self, one: Awaited) -> None:
        """Note that nobody waits for the confirmation any more."""
        if self._awaited.pop(one, 0) is None:
            self.under_way_bytes -= one.nbytes

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._looked_at = loop.time()
        self._timer = loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._awaited:
            return
        if not self._blocked():
            passed_s = asyncio.get_running_loop().time() - self._looked_at
            self._clock_s += min(passed_s, 2 * _LOOK_S)
        queued, come = self._flow.queued_bytes(), self._flow.come_bytes()
        left = self._sent - self._flow.waiting_bytes() - (queued or 0)
        moved, heard = left != self._left, come != self._come
        self._left, self._come = left, come
        patience_s = _CONFIRM_S
        if queued is None:
            patience_s += self.under_way_bytes / _SLOWEST_BYTES_PER_S
        for one in self._awaited:
            if heard or (not one.left and moved):
                one.since = self._clock_s
            one.left = left >= one.ends_at
            if self._clock_s - one.since >= patience_s:
                self._late(
                    f"the broker did not confirm a message of {one.nbytes} bytes, "
                    f"and nothing of it moved for {patience_s:.0f} s"
                )
                return
        self._look_later()


def queued_bytes(descriptor: int) -> int | None:
    """Return how many bytes of a socket the other end's TCP has yet to acknowledge.

    None where the system does not tell.
    """
    if sys.platform != "linux":
        return None
    try:
        told = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(_QUEUED.size))
    except (OSError, ValueError):  # it was closed
        return None
    found: int = _QUEUED.unpack(told)[0]
    return found
