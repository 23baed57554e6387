"""The message traffic of one channel: publish, confirm, deliver, get and acknowledge.

These frames bypass aiormq and go straight to and from the socket (see ``connection``), because
aiormq copies each body about eight times and needs five tasks for it. aiormq still opens the
channel and handles every other method on it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluffle_common.errors import LinkLost
from fluffle_common.transport.base import Body, QueueFull, Unroutable
from fluffle_common.transport.rabbitmq import frames

# Below this size, one write of a joined copy is faster than several writes without a copy.
LARGE_BYTES = 16 * 2**10
# A rejected message has the largest properties, of less than 4 KiB. Much larger ones are dropped:
# thousands of messages may wait here, each with 128 KiB of properties, and the time to decode an
# array grows with the square of its size.
_MAX_PROPERTIES_BYTES = 8 * 2**10
# How long an acknowledgement may wait for others: a batch costs hardly more than one.
_ACK_WITHIN_S = 0.02


class Content:
    """A message from the broker: the payloads of its method frame and header frame, and its body.

    ``missing_bytes`` of its body are still to come. ``tag`` is the delivery tag that settles it; a
    returned message has none.
    """

    __slots__ = ("_buffer", "channel", "header", "method", "missing_bytes", "tag")

    def __init__(self, channel: ContentChannel, method: bytes) -> None:
        self.channel, self.method = channel, method
        self.tag, self.header = 0, b""
        self.missing_bytes = 0
        self._buffer = memoryview(b"")

    def begin_body(self, header: bytes) -> None:
        """Take the header, and make room for the body of the size that it declares."""
        self.header = header if len(header) <= _MAX_PROPERTIES_BYTES else frames.NO_PROPERTIES
        self.missing_bytes = frames.body_size(header)
        # Not zeroed, because all of it is overwritten.
        self._buffer = np.empty(self.missing_bytes, np.uint8).data

    def fill(self, data: memoryview) -> None:
        """Add the next bytes of the body; raise ``ConnectionError`` if they are too many."""
        if len(data) > self.missing_bytes:
            raise ConnectionError("a message body is longer than its header declares")
        filled = self.filled_bytes
        self._buffer[filled : filled + len(data)] = data
        self.missing_bytes -= len(data)

    @property
    def filled_bytes(self) -> int:
        """How many bytes of the body have arrived."""
        return len(self._buffer) - self.missing_bytes

    @property
    def body(self) -> Body:
        """The body, copied only if it is small."""
        large = len(self._buffer) >= LARGE_BYTES
        return self._buffer.toreadonly() if large else bytes(self._buffer)


@dataclass(slots=True)
class Unconfirmed:
    """A message that is not confirmed yet; a ``ConfirmWatch`` keeps the last two fields."""

    message_id: str
    confirmation: asyncio.Future[None]
    nbytes: int
    end_offset: int  # the number of bytes sent on the channel when its last byte has left
    return_reason: str | None = None  # the broker's, if it was unroutable
    progress_at: float | None = None
    has_left: bool = False


class ContentChannel:
    """Sends and receives the messages of one channel.

    ``on_delivery`` is called with each message that is delivered to a consumer on this channel.
    ``prefetch`` is the channel's prefetch count, or 0 if it has none.
    """

    def __init__(
        self,
        number: int,
        socket: asyncio.WriteTransport,
        frame_max: int,
        on_delivery: Callable[[Content], object] | None = None,
        prefetch: int = 0,
    ) -> None:
        self.number = number
        self.frame_max = frame_max  # the most bytes of a frame
        self._socket, self._on_delivery = socket, on_delivery
        self._publish_seq = 0  # the broker numbers messages the same way
        self.sent_bytes = 0  # of messages
        self.unconfirmed: dict[int, Unconfirmed] = {}
        self._pending_gets: deque[asyncio.Future[Content | None]] = deque()
        self._unsettled: set[int] = set()  # delivery tags
        self._unsent_acks: set[int] = set()  # delivery tags
        self._ack_batch = max(prefetch // 2, 1)  # early enough that deliveries never stop
        self._ended = False

    @property
    def _closed(self) -> bool:
        return self._ended or self._socket.is_closing()

    def _check(self) -> None:
        if self._closed:
            raise LinkLost("the connection is lost")

    @property
    def unconfirmed_bytes(self) -> int:
        """The size of the unconfirmed messages."""
        return sum(message.nbytes for message in self.unconfirmed.values())

    # --- sending -------------------------------------------------------------------------------

    def publish(self, head: bytes, message_id: str, body: Body) -> asyncio.Future[None]:
        """Send a message; the future completes when the broker confirms it.

        ``head`` is the result of ``frames.publish`` with this ``message_id``. ``body`` must not
        change before the future completes. The future raises ``Unroutable``, ``QueueFull``, or the
        exception given to ``close``.

        Raises:
            LinkLost: if the socket is already closed.
        """
        self._check()
        confirmation: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._publish_seq += 1
        nbytes = len(head) + len(body)
        self.sent_bytes += nbytes
        self.unconfirmed[self._publish_seq] = Unconfirmed(
            message_id, confirmation, nbytes, self.sent_bytes
        )
        pieces: list[Body] = [head, *frames.bodies(self.number, body, self.frame_max)]
        if len(body) < LARGE_BYTES:
            self._socket.write(b"".join(pieces))
        else:
            self._socket.writelines(pieces)
        return confirmation

    def get(self, queue: str) -> asyncio.Future[Content | None]:
        """Request one message; the future's result is None if the queue is empty."""
        self._check()
        response: asyncio.Future[Content | None] = asyncio.get_running_loop().create_future()
        self._pending_gets.append(response)
        self._socket.write(frames.get(self.number, queue))
        return response

    async def take(self, queue: str) -> Content | None:
        """Get one message, None from an empty queue; if cancelled, return it to its queue."""
        response = self.get(queue)
        try:
            return await response
        except asyncio.CancelledError:
            # `_answer_get` returns what is still to come, but not what came just before.
            if (
                not response.cancelled()
                and not response.exception()
                and (late := response.result())
            ):
                self.requeue(late.tag)
            raise

    def ack(self, tag: int) -> None:
        """Acknowledge a delivery; do nothing on a closed channel.

        Acknowledgements are collected for a moment and sent together in few frames.
        """
        if self._closed:
            return
        self._unsettled.discard(tag)
        self._unsent_acks.add(tag)
        waiting = len(self._unsent_acks)
        if waiting == self._ack_batch:
            asyncio.get_running_loop().call_soon(self._send_acks)
        elif waiting == 1:
            asyncio.get_running_loop().call_later(_ACK_WITHIN_S, self._send_acks)

    def _send_acks(self) -> None:
        """Send the collected acknowledgements.

        One frame settles all tags below the oldest open one; each of the others needs its own.
        """
        if self._closed or not self._unsent_acks:
            return
        oldest_open = min(self._unsettled, default=math.inf)
        batch_end = max((tag for tag in self._unsent_acks if tag < oldest_open), default=0)
        tags = [batch_end] if batch_end else []
        tags += sorted(tag for tag in self._unsent_acks if tag > batch_end)
        self._unsent_acks.clear()
        acks = [frames.ack(self.number, tag, multiple=tag == batch_end) for tag in tags]
        self._socket.write(b"".join(acks))

    def requeue(self, tag: int) -> None:
        """Return a delivery to its queue; do nothing if the channel is closed."""
        if not self._closed:
            self._unsettled.discard(tag)
            self._socket.write(frames.requeue(self.number, tag))

    def close(self, why: Exception) -> None:
        """Close, and raise ``why`` in everyone who waits for an answer."""
        self._send_acks()
        self._ended = True
        self._on_delivery = None  # what it holds is not wanted any more
        pending: list[asyncio.Future[Any]] = [
            message.confirmation for message in self.unconfirmed.values()
        ]
        pending += self._pending_gets
        self.unconfirmed.clear()
        self._pending_gets.clear()
        for future in pending:
            if not future.done():
                future.set_exception(why)

    # --- receiving -----------------------------------------------------------------------------

    def method(self, payload: bytes) -> bool:
        """Handle a method without a body; return False if it is for aiormq."""
        match frames.kind_of(payload):
            case frames.ACK:
                self._confirm(payload, nacked=False)
            case frames.NACK:
                self._confirm(payload, nacked=True)
            case frames.GET_EMPTY:
                self._answer_get(None)
            case frames.CHANNEL_CLOSE:
                # aiormq confirms it. After that, any frame on it would end the connection.
                self._ended = True
                return False
            case _:
                return False
        return True

    def content(self, content: Content) -> None:
        """Handle a complete message."""
        match frames.kind_of(content.method):
            case frames.DELIVER:
                self._unsettle(content)
                if self._on_delivery is not None:
                    self._on_delivery(content)
            case frames.GET_OK:
                self._unsettle(content)
                self._answer_get(content)
            case frames.RETURN:  # the confirmation follows
                message_id = frames.properties(content.header).message_id or ""
                for message in self.unconfirmed.values():
                    if message.message_id == message_id and message.return_reason is None:
                        message.return_reason = frames.return_reason(content.method)
                        break

    def _unsettle(self, content: Content) -> None:
        content.tag = frames.tag(content.method)
        self._unsettled.add(content.tag)

    def _confirm(self, payload: bytes, *, nacked: bool) -> None:
        last, multiple = frames.settlement(payload)
        tags = [last]
        if multiple:
            tags = [tag for tag in self.unconfirmed if not last or tag <= last]
        for tag in tags:
            message = self.unconfirmed.pop(tag, None)
            if message is None or message.confirmation.done():
                continue
            if nacked:
                message.confirmation.set_exception(QueueFull("the broker refused the message"))
            elif message.return_reason is not None:
                unroutable = Unroutable(f"no queue is bound: {message.return_reason}")
                message.confirmation.set_exception(unroutable)
            else:
                message.confirmation.set_result(None)

    def _answer_get(self, message: Content | None) -> None:
        if not self._pending_gets:
            return
        response = self._pending_gets.popleft()
        if not response.done():
            response.set_result(message)
        elif message is not None:  # the caller was cancelled
            self.requeue(message.tag)
