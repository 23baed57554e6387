"""Publishing messages, in one piece or in parts, and rejecting invalid ones.

``fetch_parts`` fetches what is sent in parts here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from fluffle_common.clock import timestamp
from fluffle_common.concurrency import run_all
from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import Message, WithTensors
from fluffle_common.protocol.transfer_parts import Outgoing, fits
from fluffle_common.protocol.wire_format import describe, encode, lay_out
from fluffle_common.tensors.groups import NO_GROUPS, Groups
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import (
    MAX_LISTED_KEYS,
    Body,
    Delivery,
    HeaderValue,
    Link,
    Properties,
    QueueFull,
)

# The number of unconfirmed parts in flight: enough to keep the broker busy.
_WINDOW = 4

# A body that is not a valid message is cut to this size, so that a flood of them cannot push older
# entries out of the queue. A valid message is kept whole, so that it can be inspected or resent.
_KEPT_BYTES = 64 * 2**10
_KEPT_WITHOUT_ROOM_BYTES = 2**10
# How much of a rejected message's headers and of the reason is kept. With the other properties,
# they must fit into the smallest frame that AMQP allows (4096 bytes): the broker would answer a
# larger one by closing the connection, and then deliver the message again.
_HEADERS_BYTES, _REASON_BYTES = 1024, 1500
_HEADER_OVERHEAD_BYTES = 16  # the most that the encoding of a header adds to its text

# The limit of AMQP for a message_id. A run may have a name of 64 characters of up to 4 bytes.
_IDENTITY_BYTES = 255

# The header that holds the original size of a rejected message that was cut.
CUT = "cut_from_bytes"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Route:
    """An exchange and routing keys, and whether the message is durable and urgent."""

    exchange: str
    keys: Sequence[str]
    durable: bool = True
    urgent: bool = False


@contextlib.contextmanager
def _collected(refusals: list[QueueFull], route: Route) -> Iterator[None]:
    """Keep a refusal for later if there are several receivers.

    RabbitMQ refuses a message if one of its queues does, but the other queues have it. The owner of
    a queue may even have declared it such that it refuses everything.
    """
    try:
        yield
    except QueueFull as refusal:
        if len(route.keys) == 1:
            raise
        refusals.append(refusal)


async def send(link: Link, message: Message, route: Route, body: bytes | None = None) -> None:
    """Publish a message without tensors; ``body`` replaces its usual encoding."""
    await _publish(link, message, encode(message) if body is None else body, route)


async def send_tensors(
    link: Link,
    message: WithTensors,
    weights: Weights,
    route: Route,
    *,
    others: Groups = NO_GROUPS,
    parts: Route | None = None,
    around_parts: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
    progress: Progress | None = None,
    digest: Awaitable[str] | None = None,
) -> None:
    """Publish a message that carries tensors, in one piece or, if it is large, in parts.

    ``parts`` is the route of the parts, which are then sent before the message; without it, they
    follow the message by the same route. If there are parts, ``around_parts`` is entered before
    anything is published. ``progress`` is called with the numbers of confirmed parts and of all
    parts. ``digest`` is the result of ``digest_of``, if it is already being computed.
    """
    table, pieces = lay_out(weights, others)
    if fits(pieces):
        await _publish(link, message, encode(message, pieces, table), route)
        return
    outgoing = Outgoing(message, table, pieces)
    async with around_parts():
        hashing = digest if digest is not None else asyncio.to_thread(outgoing.digest)
        if parts is not None:
            digest_task = asyncio.ensure_future(hashing)  # while the parts are sent
            await _send_parts(link, outgoing, parts, progress)
            await _publish(link, message, outgoing.body(await digest_task), route)
            return
        refusals: list[QueueFull] = []
        with _collected(refusals, route):
            await _publish(link, message, outgoing.body(await hashing), route)
        with _collected(refusals, route):
            await _send_parts(link, outgoing, route, progress)
        if refusals:
            raise refusals[0]


async def send_ahead(
    link: Link,
    message: WithTensors,
    weights: Weights,
    route: Route,
    *,
    others: Groups = NO_GROUPS,
    digest: Awaitable[str],
) -> Callable[[], Awaitable[None]]:
    """Publish a message with tensors in parts, except the last part.

    The receiver can do nothing with an incomplete message. The arguments are those of
    ``send_tensors``; the tensors must be too large for one message.

    Returns:
        Publishes the last part, over the same link.
    """
    outgoing = Outgoing(message, *lay_out(weights, others))
    last = outgoing.parts - 1
    refusals: list[QueueFull] = []  # whoever refuses these parts refuses the last one, too
    with _collected(refusals, route):
        await _publish(link, message, outgoing.body(await digest), route)
    with _collected(refusals, route):
        await _send_parts(link, outgoing, route, until=last)
    return lambda: _send_parts(link, outgoing, route, first=last)


async def _publish(link: Link, message: Message, body: bytes, route: Route) -> None:
    headers = {**describe(message), "bytes": len(body)}
    if len(route.keys) > MAX_LISTED_KEYS:
        headers["recipients"] = len(route.keys)
    identity = message.identity.encode()[:_IDENTITY_BYTES].decode(errors="ignore")
    properties = Properties(message.kind, identity, headers, route.durable)
    await link.publish(
        body, properties, exchange=route.exchange, keys=route.keys, urgent=route.urgent
    )


async def _send_parts(
    link: Link,
    outgoing: Outgoing,
    route: Route,
    progress: Progress | None = None,
    *,
    first: int = 0,
    until: int | None = None,
) -> None:
    """Publish parts; concurrent publishers share one iterator, so that some are in flight."""
    remaining = enumerate(outgoing.bodies(first, until), first)
    confirmed = itertools.count(first + 1)
    refusals: list[QueueFull] = []

    async def publish_remaining() -> None:
        for number, body in remaining:
            headers = {"part": number, "parts": outgoing.parts, "bytes": len(body)}
            properties = Properties("part", f"{outgoing.id}/{number}", headers, route.durable)
            with _collected(refusals, route):
                await link.publish(body, properties, exchange=route.exchange, keys=route.keys)
            if progress is not None:
                progress(next(confirmed), outgoing.parts)

    await run_all(*(publish_remaining() for _ in range(_WINDOW)))
    if refusals:
        raise refusals[0]


def rejection(
    delivery: Delivery, error: MalformedMessage, *, room: float = math.inf
) -> tuple[Body, Properties]:
    """Return the message to put into the queue of rejected messages, with the reason.

    The body is cut, also in ``delivery``, unless it is a valid message of at most ``room`` bytes:
    to 64 KiB, or to 1 KiB if there is no room.
    """
    headers: dict[str, HeaderValue] = {
        **_bounded_headers(delivery.properties.headers),
        "reason": str(error).encode(errors="replace")[:_REASON_BYTES].decode(errors="ignore"),
        "cause": error.cause,
        "rejected_at": timestamp(),
        "from": delivery.queue,
    }
    size, kept = len(delivery.body), _KEPT_BYTES if room > 0 else _KEPT_WITHOUT_ROOM_BYTES
    if size > kept and (error.cause == "malformed" or size > room):
        headers[CUT] = size
        delivery.body = bytes(delivery.body[:kept])  # a copy, so that the rest is freed
    original = delivery.properties
    return delivery.body, Properties(original.type, original.message_id, headers)


async def reject(
    link: Link, delivery: Delivery, error: MalformedMessage, rejected: str | Route
) -> None:
    """Publish a delivery to the queue of rejected messages with the reason, then acknowledge it.

    ``rejected`` is the name of the queue, or a route to it for users who may not publish to the
    default exchange.
    """
    route = Route("", [rejected]) if isinstance(rejected, str) else rejected
    body, properties = rejection(delivery, error)
    await link.publish(body, properties, exchange=route.exchange, keys=route.keys)
    delivery.ack()


def _bounded_headers(headers: Mapping[str, HeaderValue]) -> dict[str, HeaderValue]:
    """Return the headers that fit, in their order."""
    fitting, left = dict[str, HeaderValue](), _HEADERS_BYTES
    for name, value in headers.items():
        nbytes = len(f"{name}{value}".encode(errors="surrogatepass")) + _HEADER_OVERHEAD_BYTES
        if nbytes <= left:
            fitting[name] = value
            left -= nbytes
    return fitting


def check_user(user: str | None, delivery: Delivery) -> None:
    """Raise ``MalformedMessage`` unless ``user``, if given, is a delivery's verified sender."""
    if user is None:
        return
    sender = delivery.properties.user
    if sender != user:
        fact = f"the user {sender} sent it" if sender else "it has no user_id"
        raise MalformedMessage(f"the message names {user} as its sender, but {fact}", "sender")
