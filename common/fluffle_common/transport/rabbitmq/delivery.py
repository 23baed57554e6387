"""Deliveries from RabbitMQ, decoded only as far as they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import aio_pika
from pamqp.commands import Basic

from fluffle_common.transport.base import HeaderValue, Properties
from fluffle_common.transport.rabbitmq import frames
from fluffle_common.transport.rabbitmq.channel import Content


class AmqpDelivery:
    """A delivery that decodes its properties on first use."""

    def __init__(self, content: Content, queue: str) -> None:
        self._tag: int | None = content.tag  # None once it is settled
        self._channel, self._method, self._header = content.channel, content.method, content.header
        self.body = content.body
        self.queue = queue

    @cached_property
    def _origin(self) -> frames.Origin:
        return frames.origin(self._method)

    @cached_property
    def _decoded(self) -> Basic.Properties:
        return frames.properties(self._header)

    @property
    def redelivered(self) -> bool:
        return self._origin.redelivered

    @property
    def exchange(self) -> str:
        return self._origin.exchange

    @property
    def keys(self) -> tuple[str, ...]:
        more = (self._decoded.headers or {}).get("CC")
        return (self._origin.key, *map(str, more if isinstance(more, list) else ()))

    @property
    def sent_at(self) -> float | None:
        return self._decoded.timestamp.timestamp() if self._decoded.timestamp else None

    @property
    def offset(self) -> int | None:
        offset = (self._decoded.headers or {}).get("x-stream-offset")
        return offset if isinstance(offset, int) else None

    @cached_property
    def properties(self) -> Properties:
        decoded = self._decoded
        return Properties(
            type=decoded.message_type or "",
            message_id=decoded.message_id or "",
            headers=_scalar_headers(decoded.headers),
            durable=decoded.delivery_mode == aio_pika.DeliveryMode.PERSISTENT,
            user=decoded.user_id or None,
        )

    def ack(self) -> None:
        self._settle(self._channel.ack)

    def release(self) -> None:
        self._settle(self._channel.requeue)

    def _settle(self, by: Callable[[int], None]) -> None:
        tag, self._tag = self._tag, None
        if tag is not None:  # settling twice closes the channel
            by(tag)


def _scalar_headers(headers: Any) -> dict[str, HeaderValue]:
    return {k: v for k, v in (headers or {}).items() if isinstance(v, str | int | float | bool)}
