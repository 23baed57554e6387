"""Borrowing messages from a queue without removing them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator

from fluffle_common.protocol.topology import Queue
from fluffle_common.transport.base import Delivery, Link, OtherArguments


async def is_classic(link: Link, queue: Queue) -> bool:
    """Return whether an existing queue is a classic queue, as ``queue`` describes it.

    Only a classic queue takes a message back without side effects. A quorum queue counts a failed
    delivery, moves the message to its end, and drops it after several of these. AMQP reveals the
    type of a queue only through a second declaration, which changes nothing if all arguments agree
    and loses the link otherwise.

    Raises:
        BrokerError: if the user may not declare (configure) the queue.
    """
    try:
        await link.declare([queue])
    except OtherArguments:
        return False
    return True


@contextlib.asynccontextmanager
async def borrowed(
    link: Link, queue: str, *, count: int, most_bytes: float = math.inf
) -> AsyncGenerator[AsyncIterator[Delivery]]:
    """Take messages from the head of a queue, and return each to its position on exit.

    ``link`` must be used for nothing else; its end returns the messages. The iterator takes one
    message at a time. The caller may drop a body that it no longer needs, and acknowledge a
    message that is not to return. Once the messages have ``most_bytes`` in total, no more are
    taken.
    """

    async def each() -> AsyncIterator[Delivery]:
        taken = size = 0
        while taken < count and size < most_bytes:
            delivery = await link.get(queue)
            if delivery is None:
                return
            taken += 1
            size += len(delivery.body)
            yield delivery

    try:
        yield each()
    finally:
        # Not one by one: RabbitMQ tells the next command how many messages are ready before it
        # handles the returns that are still in its own queue, so that some would be missing.
        await link.close()
