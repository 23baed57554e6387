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
from typing import Any, NamedTuple, Protocol

from fluffle_common.errors import LinkLost
from fluffle_common.transport.base import Body, QueueFull, Unroutable
from fluffle_common.transport.rabbitmq import frames

# Below this size, one write of a joined copy is faster than several writes without a copy.
LARGE_BYTES = 16 * 2**10
# How long an acknowledgement may wait for others: a batch costs hardly more than one.
_ACK_WITHIN_S = 0.02


class Socket(Protocol):
    """The part of ``asyncio.Transport`` that is used here."""

    def write(self, data: Body) -> None:
        """Send or buffer bytes, in order."""

    def writelines(self, pieces: list[Body]) -> None:
        """Send or buffer several pieces without joining them."""

    def is_closing(self) -> bool:
        """Return whether the socket is closing or closed."""


class Content(NamedTuple):
    """A received message: the payloads of its method frame and header frame, and its body."""

    method: bytes
    header: bytes
    body: Body


class Arrived(NamedTuple):
    """A received message with the delivery tag that settles it."""

    tag: int
    content: Content


@dataclass(slots=True)
class _Published:
    """An unconfirmed message; ``returned`` is the broker's reason if it was unroutable."""

    message_id: str
    confirmed: asyncio.Future[None]
    returned: str | None = None


class ContentChannel:
    """Sends and receives the messages of one channel.

    Args:
        number: the number of the channel.
        socket: the socket of its connection.
        frame_max: the maximum size of a frame in bytes.
        delivered: called with each message that is delivered to a consumer on this channel.
        prefetch: the channel's prefetch count; 0 if it has none.
    """

    def __init__(
        self,
        number: int,
        socket: Socket,
        frame_max: int,
        delivered: Callable[[Arrived], object] | None = None,
        prefetch: int = 0,
    ) -> None:
        self.number = number
        self._socket, self._frame_max, self._delivered = socket, frame_max, delivered
        self._published = 0  # the broker numbers messages the same way
        self._unconfirmed: dict[int, _Published] = {}
        self._getting: deque[asyncio.Future[Arrived | None]] = deque()
        self._owed: set[int] = set()  # tags that are not settled yet
        self._acked: set[int] = set()  # tags whose acknowledgement is not sent yet
        self._enough_acked = max(prefetch // 2, 1)  # early enough that deliveries never stop
        self._over = False

    @property
    def _closed(self) -> bool:
        return self._over or self._socket.is_closing()

    def _check(self) -> None:
        if self._closed:
            raise LinkLost("the connection is lost")

    # --- sending -------------------------------------------------------------------------------

    def publish(self, head: bytes, message_id: str, body: Body) -> asyncio.Future[None]:
        """Send a message; the future completes when the broker confirms it.

        Args:
            head: the result of ``frames.publish``.
            message_id: the message ID that ``head`` contains.
            body: the body, which must not change before the future completes.

        Returns:
            A future that raises ``Unroutable``, ``QueueFull``, or the exception given to ``lose``.

        Raises:
            LinkLost: if the socket is already closed.
        """
        self._check()
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._published += 1
        self._unconfirmed[self._published] = _Published(message_id, confirmed)
        pieces: list[Body] = [head, *frames.bodies(self.number, body, self._frame_max)]
        if len(body) < LARGE_BYTES:
            self._socket.write(b"".join(pieces))
        else:
            self._socket.writelines(pieces)
        return confirmed

    def get(self, queue: str) -> asyncio.Future[Arrived | None]:
        """Request one message; the future's result is None if the queue is empty.

        Raises:
            LinkLost: if the socket is already closed.
        """
        self._check()
        got: asyncio.Future[Arrived | None] = asyncio.get_running_loop().create_future()
        self._getting.append(got)
        self._socket.write(frames.get(self.number, queue))
        return got

    def ack(self, tag: int, *, all_before: bool = False) -> None:
        """Acknowledge a delivery; do nothing if the channel is closed.

        Acknowledgements are collected for a moment and sent together in few frames.
        """
        if self._closed:
            return
        before = len(self._acked)
        settled = {one for one in self._owed if one < tag} if all_before else set()
        settled.add(tag)
        self._owed -= settled
        self._acked |= settled
        if before < self._enough_acked <= len(self._acked):
            asyncio.get_running_loop().call_soon(self._send_acks)
        elif not before:
            asyncio.get_running_loop().call_later(_ACK_WITHIN_S, self._send_acks)

    def _send_acks(self) -> None:
        """Send the collected acknowledgements.

        One frame settles all tags below the oldest open one; each of the others needs its own.
        """
        if self._closed or not self._acked:
            return
        still_owed = min(self._owed, default=math.inf)
        together = max((tag for tag in self._acked if tag < still_owed), default=0)
        tags = [together] if together else []
        tags += sorted(tag for tag in self._acked if tag > together)
        self._acked.clear()
        pieces = [frames.ack(self.number, tag, all_before=tag == together) for tag in tags]
        self._socket.write(b"".join(pieces))

    def requeue(self, tag: int) -> None:
        """Return a delivery to its queue; do nothing if the channel is closed."""
        if not self._closed:
            self._owed.discard(tag)
            self._socket.write(frames.requeue(self.number, tag))

    def lose(self, why: Exception) -> None:
        """Close, and raise ``why`` in everyone who waits for an answer."""
        self._send_acks()
        self._over = True
        waiting: list[asyncio.Future[Any]] = [one.confirmed for one in self._unconfirmed.values()]
        waiting += self._getting
        self._unconfirmed.clear()
        self._getting.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(why)

    # --- receiving -----------------------------------------------------------------------------

    def method(self, payload: bytes) -> bool:
        """Handle a method without a body; return False if it is for aiormq."""
        match frames.kind_of(payload):
            case frames.ACK:
                self._settle(payload, refused=False)
            case frames.NACK:
                self._settle(payload, refused=True)
            case frames.GET_EMPTY:
                self._answer(None)
            case _:
                return False
        return True

    def content(self, content: Content) -> None:
        """Handle a complete message."""
        match frames.kind_of(content.method):
            case frames.DELIVER:
                arrived = self._ours(content)
                if self._delivered is not None:
                    self._delivered(arrived)
            case frames.GET_OK:
                self._answer(self._ours(content))
            case frames.RETURN:  # the confirmation follows
                message_id = frames.properties(content.header).message_id or ""
                for one in self._unconfirmed.values():
                    if one.message_id == message_id and one.returned is None:
                        one.returned = frames.returned(content.method)
                        break

    def _ours(self, content: Content) -> Arrived:
        tag = frames.tag(content.method)
        self._owed.add(tag)
        return Arrived(tag, content)

    def _settle(self, payload: bytes, *, refused: bool) -> None:
        tag, all_before = frames.settled(payload)
        tags = [tag]
        if all_before:
            tags = [known for known in self._unconfirmed if not tag or known <= tag]
        for known in tags:
            one = self._unconfirmed.pop(known, None)
            if one is None or one.confirmed.done():
                continue
            if refused:
                one.confirmed.set_exception(QueueFull("the broker refused it"))
            elif one.returned is not None:
                one.confirmed.set_exception(Unroutable(f"no queue is bound: {one.returned}"))
            else:
                one.confirmed.set_result(None)

    def _answer(self, arrived: Arrived | None) -> None:
        if not self._getting:
            return
        got = self._getting.popleft()
        if not got.done():
            got.set_result(arrived)
        elif arrived is not None:  # the caller was cancelled
            self.requeue(arrived.tag)
