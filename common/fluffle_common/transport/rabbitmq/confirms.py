"""Time limits for publisher confirms that do not depend on the speed of the network.

A message may take as long as it needs while its bytes leave this machine. Once all of them have
left, or none leave any more, its confirmation is overdue after a constant time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fluffle_common.transport.rabbitmq.channel import ContentChannel
from fluffle_common.transport.rabbitmq.connection import Connection

# How long a message may make no progress.
_CONFIRM_S = 20.0
_CHECK_EVERY_S = 1.0
# Allows for bytes in the socket buffer on systems that do not report how many there are.
_SLOWEST_BYTES_PER_S = 10_000


class ConfirmWatch:
    """Checks the unconfirmed messages of a channel for progress until it is closed.

    ``on_overdue`` is called with a reason when a confirmation is overdue. Time in which the broker
    blocks publishers does not count.
    """

    def __init__(
        self,
        connection: Connection,
        channel: ContentChannel,
        on_overdue: Callable[[str], object],
    ) -> None:
        self._connection, self._channel, self._on_overdue = connection, channel, on_overdue
        self._left_bytes, self._received_bytes = 0, 0  # at the last check
        # A clock of its own: time in which this process was stopped does not count.
        self._clock_s = 0.0
        self._check_later()

    def close(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()

    def _check_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._checked_at = loop.time()
        self._timer = loop.call_later(_CHECK_EVERY_S, self._check)

    def _check(self) -> None:
        """Note the progress of each message, and report the first one that is overdue."""
        if self._connection.blocking.reason is None:
            elapsed_s = asyncio.get_running_loop().time() - self._checked_at
            self._clock_s += min(elapsed_s, 2 * _CHECK_EVERY_S)
        queued = self._connection.queued_bytes()
        received = self._connection.splitter.received_bytes  # a confirmation may wait behind these
        left = self._channel.sent_bytes - self._connection.buffered_bytes() - (queued or 0)
        sends, receives = left != self._left_bytes, received != self._received_bytes
        self._left_bytes, self._received_bytes = left, received
        patience_s = _CONFIRM_S
        if queued is None:
            patience_s += self._channel.unconfirmed_bytes / _SLOWEST_BYTES_PER_S
        for message in self._channel.unconfirmed.values():
            if message.progress_at is None or receives or (sends and not message.has_left):
                message.progress_at = self._clock_s
            message.has_left = left >= message.end_offset
            given_up = message.confirmation.done()  # by its sender
            if self._clock_s - message.progress_at >= patience_s and not given_up:
                self._on_overdue(
                    f"the broker did not confirm a message of {message.nbytes} bytes, "
                    f"and its transfer made no progress for {patience_s:.0f} s"
                )
                return
        self._check_later()
