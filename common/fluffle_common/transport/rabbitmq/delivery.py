"""Deliveries from RabbitMQ, decoded only as far as they are read."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import cached_property
from typing import Any

import aio_pika
from pamqp.commands import Basic

from fluffle_common.transport.base import HeaderValue, Properties
from fluffle_common.transport.rabbitmq import frames
from fluffle_common.transport.rabbitmq.channel import Arrived, ContentChannel


class Arrivals:
    """An unbounded queue of received messages with one reader; None marks the end.

    It takes a fraction of the steps of an ``asyncio.Queue``, which matters at about four messages
    per worker and round.
    """

    def __init__(self) -> None:
        self.there: deque[Arrived | None] = deque()
        self._wanted: asyncio.Future[None] | None = None

    def put(self, arrived: Arrived | None) -> None:
        """Add a message and wake the reader."""
        self.there.append(arrived)
        wanted, self._wanted = self._wanted, None
        if wanted is not None and not wanted.done():
            wanted.set_result(None)

    async def some(self) -> None:
        """Wait until there is an item."""
        while not self.there:
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted


class AmqpDelivery:
    """A ``base.Delivery`` that decodes its properties on first use.

    Args:
        arrived: the received message.
        queue: the queue that it was delivered from.
        contents: the channel that it was received on.
    """

    def __init__(self, arrived: Arrived, queue: str, contents: ContentChannel) -> None:
        self._tag: int | None = arrived.tag  # None once it is settled
        self._method, self._header, self.body = arrived.content
        self.queue = queue
        self._contents = contents

    @cached_property
    def _origin(self) -> frames.Origin:
        return frames.origin(self._method)

    @cached_property
    def _read(self) -> Basic.Properties:
        return frames.properties(self._header)

    @property
    def redelivered(self) -> bool:
        """See ``base.Delivery``."""
        return self._origin.redelivered

    @property
    def exchange(self) -> str:
        """See ``base.Delivery``."""
        return self._origin.exchange

    @property
    def keys(self) -> tuple[str, ...]:
        """See ``base.Delivery``."""
        more = (self._read.headers or {}).get("CC")
        return (self._origin.key, *map(str, more if isinstance(more, list) else ()))

    @property
    def sent_at(self) -> float | None:
        """See ``base.Delivery``."""
        return self._read.timestamp.timestamp() if self._read.timestamp else None

    @property
    def offset(self) -> int | None:
        """See ``base.Delivery``."""
        offset = (self._read.headers or {}).get("x-stream-offset")
        return offset if isinstance(offset, int) else None

    @cached_property
    def properties(self) -> Properties:
        """See ``base.Delivery``."""
        read = self._read
        return Properties(
            type=read.message_type or "",
            message_id=read.message_id or "",
            headers=_readable(read.headers),
            durable=read.delivery_mode == aio_pika.DeliveryMode.PERSISTENT,
            user=read.user_id or None,
        )

    def ack(self, *, all_before: bool = False) -> None:
        """Acknowledge it; ``all_before`` includes everything received earlier on its channel."""
        tag = self.disown()
        if tag is not None:
            self._contents.ack(tag, all_before=all_before)

    def release(self) -> None:
        """See ``base.Delivery``."""
        tag = self.disown()
        if tag is not None:
            self._contents.requeue(tag)

    def disown(self) -> int | None:
        """Return its delivery tag on the first call only: settling twice closes the channel."""
        tag, self._tag = self._tag, None
        return tag


def _readable(headers: Any) -> dict[str, HeaderValue]:
    return {k: v for k, v in (headers or {}).items() if isinstance(v, str | int | float | bool)}
