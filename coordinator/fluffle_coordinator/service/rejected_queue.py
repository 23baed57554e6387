"""Rejected messages on their way to the rejected queue."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fluffle_common.errors import MalformedMessage
from fluffle_common.transport.base import Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import rejection
from fluffle_coordinator.service.serial_queue import SerialQueue

_MAX_BYTES = 2**28  # as many as the rejected queue holds


class RejectedQueue:
    """Publishes rejected messages in order, next to the other messages of the outbox.

    However many messages a worker sends that are rejected, the work of the others does not wait for
    them, and their bodies take a bounded amount of memory. ``publish`` performs a publish over the
    current link.
    """

    def __init__(
        self, queue: str, publish: Callable[[Callable[[Link], Awaitable[None]]], Awaitable[None]]
    ) -> None:
        self._queue, self._publish = queue, publish
        self._held_bytes = 0
        self._jobs = SerialQueue()
        self.run, self.drained = self._jobs.run, self._jobs.drained

    def put(self, delivery: Delivery, wrong: MalformedMessage) -> None:
        """Put a delivery into the rejected queue with the error, then acknowledge it.

        It is dropped if there is no such queue, or no room in it. Its body is cut if too many bytes
        are waiting.
        """
        room = _MAX_BYTES - self._held_bytes
        # Not ``wrong`` itself: its frames would keep the decoder's buffers until the publish.
        body, properties = rejection(delivery, wrong, room=room)
        self._held_bytes += len(body)

        async def publish(link: Link) -> None:
            try:
                await link.publish(body, properties, exchange="", keys=[self._queue])
            except (QueueFull, Unroutable):
                delivery.ack()  # else such messages would use up the prefetch of their queue
                raise
            delivery.ack()

        async def job() -> None:
            await self._publish(publish)
            self._held_bytes -= len(body)

        self._jobs.put(job)
