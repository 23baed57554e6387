"""Looking at messages without taking them away."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator

from fluffle_common.protocol.topology import Queue
from fluffle_common.transport.base import Delivery, Link, OtherArguments


async def is_classic(link: Link, queue: Queue) -> bool:
    """Whether a queue that exists is a classic one, as ``queue`` (of a classic topology) says.

    Only there is taking a message and giving it back free of consequences: a quorum queue counts
    it as a delivery that failed, puts the message at its end, and drops it after some such. AMQP
    tells the type of a queue only to who declares it again: nothing happens where all agrees, and
    otherwise the link is lost.

    Raises:
        BrokerError: where this user may not declare, that is, configure, the queue.
    """
    try:
        await link.declare([queue])
    except OtherArguments:
        return False
    return True


@contextlib.asynccontextmanager
async def held(
    link: Link, queue: str, *, count: int, most_bytes: float = math.inf
) -> AsyncGenerator[AsyncIterator[Delivery]]:
    """Take messages from the head of a queue and give them back at the end, each to its place.

    They are taken one by one, as they are asked for; whoever is done with a body may let go of it.

    Args:
        link: a link of its own: should we die, its loss gives everything back too.
        queue: a classic queue.
        count: at most so many messages.
        most_bytes: no more once they have so many bytes together.
    """
    taken: list[Delivery] = []

    async def each() -> AsyncIterator[Delivery]:
        size = 0
        while len(taken) < count and size < most_bytes:
            delivery = await link.get(queue)
            if delivery is None:
                return
            taken.append(delivery)
            size += len(delivery.body)
            yield delivery

    try:
        yield each()
    finally:
        for delivery in taken:
            delivery.release()
