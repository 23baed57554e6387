"""Fetching the parts of a large message from the queue that holds them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import Part
from fluffle_common.protocol.transfer_parts import Incoming
from fluffle_common.protocol.wire_format import SMALL_HEADER_BYTES, decode
from fluffle_common.transport.base import Body, Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import check_user, reject

_WINDOW = 4  # the most parts in flight to us
# How many messages are read for each part. A sender purges the queue before it sends a transfer,
# but a lost connection may double parts. Other messages in the queue must not hold up the run.
_MESSAGES_PER_PART = 10


class PartsGone(Exception):
    """Parts of a transfer are missing on the broker; their sender must send them again."""


def read_part(body: Body, federation: str | None = None) -> tuple[Part, memoryview]:
    """Decode a part into its header and its piece of the payload, or raise ``MalformedMessage``."""
    message, payload = decode(body, federation, max_header=SMALL_HEADER_BYTES)
    if not isinstance(message, Part):
        raise MalformedMessage(
            f"expected a part, but received a message of kind {message.kind}", "kind"
        )
    return message, payload


async def fetch(
    link: Link, queue: str, into: Incoming, rejected: str, *, user: str | None = None
) -> None:
    """Fetch the parts of a transfer; one part is stored while the next one arrives.

    Parts are acknowledged on arrival, because their sender keeps them and sends them again on
    request. Parts of other transfers are acknowledged too, since nobody will ask for them. Anything
    else goes to the queue ``rejected``, as does a part that was not sent by ``user``, if given.

    Raises:
        PartsGone: if parts are missing.
    """
    parts = into.transfer.parts
    counts = await link.counts(queue)  # complete: parts are sent before the announcement
    if counts is None or counts.ready < parts:
        raise PartsGone(f"only {counts.ready if counts else 0} of {parts} parts are in the queue")
    most = min(counts.ready, _MESSAGES_PER_PART * parts)
    storing: asyncio.Task[None] | None = None
    try:
        async with contextlib.aclosing(_get(link, queue, most)) as deliveries:
            async for delivery in deliveries:
                if storing is not None:
                    try:
                        await asyncio.shield(storing)
                    except BaseException:
                        delivery.release()  # else it would stay unacknowledged
                        raise
                storing = asyncio.create_task(_store(link, delivery, into, rejected, user))
                if into.done_parts >= parts - 1:  # it may be the last one
                    await asyncio.shield(storing)
                if into.complete:
                    break
        if storing is not None:
            await asyncio.shield(storing)
    finally:
        if storing is not None:
            # The thread cannot be stopped, and must not write to `into` after this has returned.
            await asyncio.wait([storing])
            storing.exception()  # if two errors occur, the first one is raised
    if not into.complete:
        raise PartsGone(f"only {into.done_parts} of {parts} parts arrived")


async def _store(
    link: Link, delivery: Delivery, into: Incoming, rejected: str, user: str | None
) -> None:
    try:
        check_user(user, delivery)
        part, payload = read_part(delivery.body)
        await asyncio.to_thread(into.add, part, payload)
    except MalformedMessage as error:
        try:
            await reject(link, delivery, error, rejected)
        except (QueueFull, Unroutable):  # the broker cannot keep it, and nobody else needs it
            delivery.ack()
    else:
        delivery.ack()


async def _get(link: Link, queue: str, count: int) -> AsyncGenerator[Delivery]:
    """Get ``count`` messages of a queue, or fewer if it is empty earlier.

    Several requests are under way at a time. This is faster than a consumer, which takes four round
    trips to start.
    """
    requests = deque[asyncio.Future[Delivery | None]]()
    try:
        for left in range(count, 0, -1):
            while len(requests) < min(_WINDOW, left):
                requests.append(asyncio.ensure_future(link.get(queue, foreign=True)))
            delivery = await requests[0]
            requests.popleft()  # not earlier: if this is cancelled, its message is to be returned
            if delivery is None:
                return
            yield delivery
    finally:
        for request in requests:
            request.cancel()  # returns the message to its queue
        for unread in await asyncio.gather(*requests, return_exceptions=True):
            if unread is not None and not isinstance(unread, BaseException):
                unread.release()  # it arrived before the request was cancelled
