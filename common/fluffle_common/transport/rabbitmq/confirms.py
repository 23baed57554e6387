"""Time limits for publisher confirms that do not depend on the speed of the network.

A message may take as long as it needs while its bytes leave this machine. Once all of them have
left, or none leave any more, its confirmation is overdue after a constant time.
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

# How long a message may make no progress.
_CONFIRM_S = 20.0
_LOOK_S = 1.0
# Allows for bytes in the socket buffer on systems that do not report how many there are.
_SLOWEST_BYTES_PER_S = 10_000

_QUEUED = struct.Struct("@i")


class Flow(Protocol):
    """The byte counters of one connection."""

    def waiting_bytes(self) -> int:
        """Return how many bytes this process has not yet passed to the operating system."""

    def queued_bytes(self) -> int | None:
        """Return how many sent bytes the peer's TCP has not acknowledged; None if unknown."""

    def come_bytes(self) -> int:
        """Return the total size of the received bodies, behind which a confirmation may wait."""


@dataclass(slots=True, eq=False)
class Awaited:
    """A message that is not confirmed yet.

    Args:
        nbytes: the size of the message.
        ends_at: the number of bytes sent on the channel when the last byte of it has left.
        since: the time of its last progress, by the watch's own clock.
        left: whether all of it has left.
    """

    nbytes: int
    ends_at: int
    since: float
    left: bool = False


class ConfirmWatch:
    """Checks the unconfirmed messages of one channel for progress.

    Args:
        flow: the byte counters of the channel's connection.
        late: called with a reason when a confirmation is overdue.
        blocked: returns whether the broker blocks publishers; that time does not count.
    """

    def __init__(
        self, flow: Flow, late: Callable[[str], object], blocked: Callable[[], bool]
    ) -> None:
        self.under_way_bytes = 0
        self._flow, self._late, self._blocked = flow, late, blocked
        self._awaited: dict[Awaited, None] = {}
        self._sent = 0  # bytes, since there last was no unconfirmed message
        self._left, self._come = 0, 0  # at the last look
        # A clock of its own: time in which this process was stopped does not count.
        self._clock_s, self._looked_at = 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def sending(self, nbytes: int) -> Awaited:
        """Start watching a message of this size; call this before sending it."""
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
        """Stop watching a message, because it was confirmed or its sender gave up."""
        if self._awaited.pop(one, 0) is None:
            self.under_way_bytes -= one.nbytes

    def close(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._looked_at = loop.time()
        self._timer = loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        """Note the progress of each message, and report the first one that is overdue."""
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
    """Return how many bytes in a socket's send queue the peer's TCP has not acknowledged.

    Returns None on systems that do not report it, and for a closed socket.
    """
    if sys.platform != "linux":
        return None
    try:
        answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(_QUEUED.size))
    except (OSError, ValueError):  # it is closed
        return None
    nbytes: int = _QUEUED.unpack(answer)[0]
    return nbytes
