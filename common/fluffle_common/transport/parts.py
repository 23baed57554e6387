"""The parts of a large message, fetched from the queue in which they lie."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.codec import SMALL_HEADER_BYTES, decode
from fluffle_common.protocol.messages import Part
from fluffle_common.protocol.transfer import Incoming
from fluffle_common.transport.base import Body, Delivery, Link
from fluffle_common.transport.messaging import check_user, reject

# How many parts may be on their way to us.
_WINDOW = 4
# So few are asked for one by one.
_FEW_PARTS = 8
# How long the next part may take to come, once the broker says that it has all of them.
_PART_PATIENCE_S = 60.0


class PartsGone(Exception):
    """Parts of a transfer are not on the broker any more: their sender has to send them again."""


def read_part(body: Body, federation: str | None = None) -> tuple[Part, memoryview]:
    """Read what lies in an outbox: a part, and its piece of the payload.

    Raises:
        MalformedMessage: where it is anything else.
    """
    message, payload = decode(body, federation, max_header=SMALL_HEADER_BYTES)
    if not isinstance(message, Part):
        raise MalformedMessage(f"a message of kind {message.kind} is no part", "kind")
    return message, payload


async def fetch(
    link: Link, queue: str, into: Incoming, rejected: str, *, user: str | None = None
) -> None:
    """Pull the parts of a transfer out of a queue; each is taken in while the next one comes.

    They are acknowledged as they come: their sender has them still, and sends them again when it is
    asked. So are the parts of other transfers, which nobody will ask for; what is no part at all
    goes to the queue ``rejected``, and so does what another than ``user`` has sent, where that is
    given.

    Raises:
        PartsGone: where some are missing.
    """
    parts = into.transfer.parts
    there = await link.counts(queue)  # all of them, since they were sent before the announcement
    if there is None or there.ready < parts:
        raise PartsGone(f"{there.ready if there else 0} of {parts} parts are there")
    few = parts <= _FEW_PARTS
    coming = _one_by_one(link, queue) if few else _streamed(link, queue, there.ready)
    taking: asyncio.Task[None] | None = None
    try:
        async with contextlib.aclosing(coming) as deliveries:
            async for delivery in deliveries:
                if taking is not None:
                    await asyncio.shield(taking)
                taking = asyncio.create_task(_take(link, delivery, into, rejected, user))
                if into.done_parts >= parts - 1:  # it may be the last one
                    await asyncio.shield(taking)
                if into.complete:
                    break
        if taking is not None:
            await asyncio.shield(taking)
    finally:
        if taking is not None:
            # A thread cannot be stopped: nothing is to be kept any more once this has returned.
            await asyncio.wait([taking])
            taking.exception()  # of two reasons to give up, the first one is raised
    if not into.complete:
        raise PartsGone(f"{into.done_parts} of {parts} parts came")


async def _take(
    link: Link, delivery: Delivery, into: Incoming, rejected: str, user: str | None
) -> None:
    try:
        check_user(user, delivery)
        part, payload = read_part(delivery.body)
        await asyncio.to_thread(into.add, part, payload)
    except MalformedMessage as wrong:
        await reject(link, delivery, wrong, rejected)
    else:
        delivery.ack()


async def _one_by_one(link: Link, queue: str) -> AsyncGenerator[Delivery]:
    """Take what is in a queue; a few messages are taken sooner than a consumer is begun."""
    while (delivery := await link.get(queue)) is not None:
        yield delivery


async def _streamed(link: Link, queue: str, count: int) -> AsyncGenerator[Delivery]:
    """Consume so many messages of a queue."""
    async with contextlib.aclosing(await link.consume(queue, prefetch=2 * _WINDOW)) as deliveries:
        for _ in range(count):
            try:
                async with asyncio.timeout(_PART_PATIENCE_S):
                    delivery = await anext(deliveries)
            except TimeoutError:
                return
            yield delivery
