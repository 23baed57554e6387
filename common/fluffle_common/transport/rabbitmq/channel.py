"""The contents of one channel: what is published, confirmed, delivered, got and settled there.

All of it goes past aiormq, straight to and from the socket (see ``connection``), since aiormq
copies a body some eight times and runs through five tasks for each; it keeps the channel open, and
everything else that happens on it.
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

# Smaller bodies are better copied, into one piece with what is before them, than carried apart.
LARGE_BYTES = 16 * 2**10
# So long an acknowledgement may wait for others: many that leave together cost the broker, and us,
# hardly more than one.
_ACK_WITHIN_S = 0.02


class Socket(Protocol):
    """What contents are written to: an asyncio transport."""

    def write(self, data: Body) -> None:
        """Send bytes, at once or later, in order."""

    def writelines(self, pieces: list[Body]) -> None:
        """Send several pieces, without joining them."""

    def is_closing(self) -> bool:
        """Return whether nothing can be sent any more."""


class Content(NamedTuple):
    """A message that has come in: the payloads of its method and of its header, and its body."""

    method: bytes
    header: bytes
    body: Body


class Arrived(NamedTuple):
    """A message that is ours until it is settled by its tag."""

    tag: int
    content: Content


@dataclass(slots=True)
class _Published:
    """A message that is not confirmed yet; ``returned`` says why no queue took it."""

    message_id: str
    confirmed: asyncio.Future[None]
    returned: str | None = None


class ContentChannel:
    """See above.

    Args:
        number: the channel's.
        socket: where to write.
        frame_max: the most bytes that a frame may have.
        delivered: given what is delivered to a consumer on this channel.
        prefetch: how many the broker delivers before some are settled; 0 where it does not count.
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
        self._published = 0  # how many; the broker counts them too, and confirms by number
        self._unconfirmed: dict[int, _Published] = {}
        self._getting: deque[asyncio.Future[Arrived | None]] = deque()
        self._owed: set[int] = set()  # the tags of what came and is not settled yet
        self._acked: set[int] = set()  # settled, and not sent yet
        self._enough_acked = max(prefetch // 2, 1)  # so that the broker never waits for us
        self._over = False

    @property
    def _closed(self) -> bool:
        return self._over or self._socket.is_closing()

    def _check(self) -> None:
        if self._closed:
            raise LinkLost("the connection is lost")

    # --- what goes out -------------------------------------------------------------------------

    def publish(self, head: bytes, message_id: str, body: Body) -> asyncio.Future[None]:
        """Send a message; the future is done when the broker has taken it.

        Args:
            head: what ``frames.publish`` returns for it.
            message_id: the same that is in ``head``.
            body: its bytes, which must stay as they are until then.

        Returns:
            A future that raises ``Unroutable``, ``QueueFull``, or what ``lose`` was given.

        Raises:
            LinkLost: where the socket is closed, of which the others will only hear.
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
        """Ask for one message; the future is done with it, or with None where there is none.

        Raises:
            LinkLost: as ``publish`` does.
        """
        self._check()
        got: asyncio.Future[Arrived | None] = asyncio.get_running_loop().create_future()
        self._getting.append(got)
        self._socket.write(frames.get(self.number, queue))
        return got

    def ack(self, tag: int, *, all_before: bool = False) -> None:
        """Acknowledge a delivery; nothing happens where the channel is over.

        What is acknowledged in a moment, at least in one turn of the loop, leaves together, in few
        frames.
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
        """Give a delivery back; nothing happens where the channel is over."""
        if not self._closed:
            self._owed.discard(tag)
            self._socket.write(frames.requeue(self.number, tag))

    def lose(self, why: Exception) -> None:
        """Let go: whoever waits is told why, and nothing more is sent."""
        self._send_acks()
        self._over = True
        waiting: list[asyncio.Future[Any]] = [one.confirmed for one in self._unconfirmed.values()]
        waiting += self._getting
        self._unconfirmed.clear()
        self._getting.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(why)

    # --- what comes in -------------------------------------------------------------------------

    def method(self, payload: bytes) -> bool:
        """Take a method without a content; return whether it is one of ours."""
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
        """Take a message that is complete."""
        match frames.kind_of(content.method):
            case frames.DELIVER:
                arrived = self._ours(content)
                if self._delivered is not None:
                    self._delivered(arrived)
            case frames.GET_OK:
                self._answer(self._ours(content))
            case frames.RETURN:  # its confirmation follows
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
        elif arrived is not None:  # whoever asked has left
            self.requeue(arrived.tag)
