"""Time limits for publisher confirms that do not depend on the speed of the network.

A message may take as long as it needs while its bytes leave this machine. Once all of them have
left, or none leave any more, its confirmation is overdue after a constant time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from fluffle_common.transport.rabbitmq.connection import Connection

# How long a message may make no progress.
_CONFIRM_S = 20.0
_CHECK_EVERY_S = 1.0
# Allows for bytes in the socket buffer on systems that do not report how many there are.
_SLOWEST_BYTES_PER_S = 10_000


@dataclass(slots=True, eq=False)
class Unconfirmed:
    """A message that is not confirmed yet."""

    nbytes: int
    end_offset: int  # the number of bytes sent on the channel when its last byte has left
    progress_at: float  # the time of its last progress, by the watch's own clock
    has_left: bool = False


class ConfirmWatch:
    """Checks the unconfirmed messages of one channel for progress.

    ``on_overdue`` is called with a reason when a confirmation is overdue. Time in which the broker
    blocks publishers does not count.
    """

    def __init__(self, connection: Connection, on_overdue: Callable[[str], object]) -> None:
        self.unconfirmed_bytes = 0
        self._connection, self._on_overdue = connection, on_overdue
        self._unconfirmed: dict[Unconfirmed, None] = {}
        self._sent_bytes = 0  # since there last was no unconfirmed message
        self._left_bytes, self._received_bytes = 0, 0  # at the last check
        # A clock of its own: time in which this process was stopped does not count.
        self._clock_s, self._checked_at = 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, nbytes: int) -> Unconfirmed:
        """Start watching a message of this size; call this before sending it."""
        if not self._unconfirmed:
            self._sent_bytes = self._left_bytes = 0
        self._sent_bytes += nbytes
        self.unconfirmed_bytes += nbytes
        message = Unconfirmed(nbytes, self._sent_bytes, self._clock_s)
        self._unconfirmed[message] = None
        if self._timer is None:
            self._check_later()
        return message

    def discard(self, message: Unconfirmed) -> None:
        """Stop watching a message, because it was confirmed or its sender gave up."""
        if self._unconfirmed.pop(message, 0) is None:
            self.unconfirmed_bytes -= message.nbytes

    def close(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _check_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._checked_at = loop.time()
        self._timer = loop.call_later(_CHECK_EVERY_S, self._check)

    def _check(self) -> None:
        """Note the progress of each message, and report the first one that is overdue."""
        self._timer = None
        if not self._unconfirmed:
            return
        if self._connection.blocking.reason is None:
            elapsed_s = asyncio.get_running_loop().time() - self._checked_at
            self._clock_s += min(elapsed_s, 2 * _CHECK_EVERY_S)
        queued = self._connection.queued_bytes()
        received = self._connection.splitter.received_bytes  # a confirmation may wait behind these
        left = self._sent_bytes - self._connection.buffered_bytes() - (queued or 0)
        sends, receives = left != self._left_bytes, received != self._received_bytes
        self._left_bytes, self._received_bytes = left, received
        patience_s = _CONFIRM_S
        if queued is None:
            patience_s += self.unconfirmed_bytes / _SLOWEST_BYTES_PER_S
        for message in self._unconfirmed:
            if receives or (not message.has_left and sends):
                message.progress_at = self._clock_s
            message.has_left = left >= message.end_offset
            if self._clock_s - message.progress_at >= patience_s:
                self._on_overdue(
                    f"the broker did not confirm a message of {message.nbytes} bytes, "
                    f"and its transfer made no progress for {patience_s:.0f} s"
                )
                return
        self._check_later()
