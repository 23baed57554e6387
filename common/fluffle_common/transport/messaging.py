"""Sending messages, in one piece or in parts, and rejecting what is wrong; see ``parts``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from fluffle_common.clock import timestamp
from fluffle_common.concurrency import run_all
from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.codec import (
    Packing,
    describe,
    encode,
)
from fluffle_common.protocol.messages import Message, WithTensors
from fluffle_common.tensors.groups import NO_GROUPS, Groups
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import NAMED, Delivery, HeaderValue, Link, Properties

# How many parts may be on their way to the broker, unconfirmed: enough that it never waits for us.
_WINDOW = 4

# Of what is no message at all, so much is kept: many of these must not push out what was rejected
# before. What is a message, if not a welcome one, is kept whole, to be looked at or sent again.
_KEPT_BYTES = 64 * 2**10
# Of a rejected message's own headers, so many of so many characters at most are kept.
_HEADERS, _HEADER_CHARACTERS = 32, 500

# The header of a rejected message that says how long it was, where only its beginning is kept.
CUT = "cut_from_bytes"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Route:
    """Where a message goes, whether it outlives the broker, and whether it goes ahead of others."""

    exchange: str
    keys: Sequence[str]
    durable: bool = True
    urgent: bool = False


async def send(link: Link, message: Message, route: Route, body: bytes | None = None) -> None:
    """Publish a message without tensors; ``body`` is how it is packed, if not as ever."""
    await _publish(link, message, encode(message) if body is None else body, route)


async def send_tensors(
    link: Link,
    message: WithTensors,
    weights: Weights,
    route: Route,
    *,
    beside: Groups = NO_GROUPS,
    parts: Route | None = None,
    before_parts: Callable[[], Awaitable[None]] | None = None,
    progress: Progress | None = None,
    digest: Awaitable[str] | None = None,
) -> None:
    """Publish a message that carries tensors, in one piece or, where it is large, in parts.

    Args:
        link: the way to the broker.
        message: the header, yet without its table of tensors.
        weights: the tensors of the model's group.
        route: where the message goes.
        beside: tensors of other groups.
        parts: where its parts go, ahead of it; None sends them after it, the same way.
        before_parts: called first, if there are parts at all.
        progress: told how many parts of how many the broker has taken.
        digest: what ``codec.digest_of`` returns for the tensors, where somebody works it out
            already.
    """
    packing = Packing(message, weights, beside)
    if not packing.parts:
        await _publish(link, message, packing.body(), route)
        return
    if before_parts is not None:
        await before_parts()
    hashing = digest if digest is not None else asyncio.to_thread(packing.digest)
    if parts is not None:
        finding = asyncio.ensure_future(hashing)  # meanwhile
        await _send_parts(link, packing, parts, progress)
        await _publish(link, message, packing.body(await finding), route)
    else:
        await _publish(link, message, packing.body(await hashing), route)
        await _send_parts(link, packing, route, progress)


async def _publish(link: Link, message: Message, body: bytes, route: Route) -> None:
    headers = {**describe(message), "bytes": len(body)}
    if len(route.keys) > NAMED:
        headers["recipients"] = len(route.keys)
    properties = Properties(
        type=message.kind,
        message_id=message.identity,
        headers=headers,
        durable=route.durable,
    )
    await link.publish(
        body, properties, exchange=route.exchange, keys=route.keys, urgent=route.urgent
    )


async def _send_parts(
    link: Link, packing: Packing, route: Route, progress: Progress | None
) -> None:
    left = enumerate(packing.bodies())

    async def one_after_the_other() -> None:
        for number, body in left:
            headers = {"part": number, "parts": packing.parts, "bytes": len(body)}
            properties = Properties(
                type="part",
                message_id=f"{packing.id}/{number}",
                headers=headers,
                durable=route.durable,
            )
            await link.publish(body, properties, exchange=route.exchange, keys=route.keys)
            if progress is not None:
                progress(number + 1, packing.parts)

    await run_all(*(one_after_the_other() for _ in range(_WINDOW)))


async def reject(
    link: Link, delivery: Delivery, wrong: MalformedMessage, rejected: str | Route
) -> None:
    """Put a delivery into a queue ``rejected`` with what is wrong, then acknowledge it.

    Args:
        link: the way to the broker.
        delivery: what is refused.
        wrong: why.
        rejected: the queue, or the way there for who may not publish to a queue by its name.
    """
    headers: dict[str, HeaderValue] = {
        **_in_bounds(delivery.properties.headers),
        "reason": str(wrong),
        "cause": wrong.cause,
        "rejected_at": timestamp(),
        "from": delivery.queue,
    }
    body = delivery.body
    if wrong.cause == "malformed" and len(body) > _KEPT_BYTES:
        headers[CUT] = len(body)
        body = bytes(body[:_KEPT_BYTES])
    properties = Properties(
        type=delivery.properties.type,
        message_id=delivery.properties.message_id,
        headers=headers,
    )
    route = Route("", [rejected]) if isinstance(rejected, str) else rejected
    await link.publish(body, properties, exchange=route.exchange, keys=route.keys)
    delivery.ack()


def _in_bounds(headers: Mapping[str, HeaderValue]) -> dict[str, HeaderValue]:
    """Keep as much of somebody's headers as always fits into AMQP's frame, with ours beside it."""
    short = [(k, v) for k, v in headers.items() if len(k) + len(str(v)) <= _HEADER_CHARACTERS]
    return dict(short[:_HEADERS])


def check_user(user: str | None, delivery: Delivery) -> None:
    """Compare whom a message has to be from with who the broker says has sent it.

    Raises:
        MalformedMessage: of cause ``sender``, where that is somebody else, or not known; ``user``
            None takes anyone.
    """
    if user is None:
        return
    sender = delivery.properties.user
    if sender != user:
        raise MalformedMessage(
            f"it names {user} as its sender, but the user {sender or 'unknown'} sent it", "sender"
        )
