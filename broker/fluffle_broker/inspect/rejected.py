"""What was refused: listed, looked at, sent on its way again, or thrown away."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fluffle_broker.inspect.browse import held, is_classic
from fluffle_broker.inspect.decode import DecodedMessage, decode_message
from fluffle_common.errors import UsageError
from fluffle_common.protocol.topology import PRESENCE_KINDS, UPDATE_KINDS, Topology
from fluffle_common.transport.base import Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import CUT
from fluffle_common.transport.rabbitmq.management import QueueFigures

# What rejecting adds, and what RabbitMQ adds to what it dead-letters.
_ADDED = ("reason", "cause", "rejected_at", "from")
_BY_BROKER = "x-"


@dataclass(frozen=True)
class Rejected:
    """A refused message; ``number`` counts from 1, the oldest that is kept."""

    number: int
    reading: DecodedMessage

    @property
    def reason(self) -> str:
        """Why, in words."""
        told = self.reading.header("reason")
        if told is None and self.reading.header("x-first-death-reason") is not None:
            told = f"RabbitMQ dropped it ({self.reading.header('x-first-death-reason')})"
        return str(told or "unknown")

    @property
    def cause(self) -> str:
        """Why, as one of ``errors.CAUSES``."""
        return str(self.reading.header("cause") or "unknown")

    @property
    def rejected_at(self) -> str | None:
        """When, ISO 8601."""
        told = self.reading.header("rejected_at")
        return str(told) if told is not None else None

    @property
    def queue(self) -> str | None:
        """The queue that it was refused from; None where nobody noted it."""
        told = self.reading.header("from") or self.reading.header("x-first-death-queue")
        return str(told) if told is not None else None

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "number": self.number,
            "reason": self.reason,
            "cause": self.cause,
            "rejected_at": self.rejected_at,
            "from": self.queue,
            **self.reading.as_dict(now),
        }


async def kept(link: Link, topology: Topology) -> list[Rejected]:
    """Return all that is kept, the oldest first; bodies are let go of, the queue is as before.

    Raises:
        UsageError: where the queue is not there, or cannot be looked at without consequences.
    """
    count = await _count(link, topology)
    await _must_be_classic(link, topology)
    found: list[Rejected] = []
    async with held(link, topology.rejected, count=count) as each:
        async for delivery in each:
            reading = decode_message(delivery, topology.federation, values=False)
            found.append(Rejected(len(found) + 1, reading))
            delivery.body = b""
    return found


async def one(link: Link, topology: Topology, number: int) -> Rejected:
    """Return one in full.

    Raises:
        UsageError: where there is none of that number, or see ``kept``.
    """
    count = await _count(link, topology)
    await _must_be_classic(link, topology)
    at = 0
    async with held(link, topology.rejected, count=number) as each:
        async for delivery in each:
            at += 1
            if at == number:
                return Rejected(number, decode_message(delivery, topology.federation))
            delivery.body = b""
    raise _no_such(topology, number, count)


@dataclass(frozen=True)
class Requeued:
    """What became of one message: where it went, or ``left`` says why it stays."""

    message: Rejected
    exchange: str = ""
    key: str = ""
    left: str | None = None


async def requeue(
    link: Link, topology: Topology, numbers: Collection[int] | None
) -> list[Requeued]:
    """Publish refused messages again, to where they came from.

    Each is published, confirmed by the broker, and only then taken out: dying in between leaves it
    twice, never lost; who counts updates knows one that comes twice.

    Args:
        link: a link of its own.
        topology: the names of the federation.
        numbers: which ones; None for all that are kept now.

    Raises:
        UsageError: where there is none of that number.
    """
    count = await _count(link, topology)
    for number in numbers or ():
        if not 1 <= number <= count:
            raise _no_such(topology, number, count)
    found: list[Requeued] = []
    back: list[Delivery] = []
    try:
        for number in range(1, (count if numbers is None else max(numbers, default=0)) + 1):
            delivery = await link.get(topology.rejected)
            if delivery is None:
                break
            if numbers is not None and number not in numbers:
                back.append(delivery)
                continue
            reading = decode_message(delivery, topology.federation, values=False)
            done = await _send_again(link, topology, Rejected(number, reading))
            found.append(done)
            if done.left is None:
                delivery.ack()
            else:
                back.append(delivery)
            delivery.body = b""
    finally:
        for delivery in back:
            delivery.release()
    return found


async def purge(link: Link, topology: Topology) -> int:
    """Throw away what is kept now; return how many messages that were.

    One by one, since RabbitMQ counts what is acknowledged and not what is purged: so ``dropped``
    stays right.
    """
    gone = 0
    for _ in range(await _count(link, topology)):
        delivery = await link.get(topology.rejected)
        if delivery is None:
            break
        delivery.ack()
        gone += 1
    return gone


def destination(message: Rejected, topology: Topology) -> tuple[str, str] | None:
    """Return the exchange and the key that lead a message back to where it was refused.

    A message of a kind that its queue has no business with goes by the queue's own name; where
    nobody noted the queue, the kind and the worker tell. None where nothing tells.
    """
    reading = message.reading
    queue, kind, worker = message.queue, reading.kind, reading.worker
    sender = _refused_by(reading.delivery, topology)
    if sender is not None and queue not in (topology.inbox(sender), topology.outbox(sender)):
        return None  # a worker refuses its own mail only: this may lead anywhere
    by_key = {topology.updates: UPDATE_KINDS, topology.presence: PRESENCE_KINDS}
    if queue is None:
        known = worker is not None and kind in (*UPDATE_KINDS, *PRESENCE_KINDS)
        return (topology.results, f"{kind}.{worker}") if known else None
    if topology.find(queue) is None:
        return None
    if worker is not None and kind in by_key.get(queue, ()):
        return topology.results, f"{kind}.{worker}"
    if queue.startswith(topology.inbox("")):
        return topology.work, queue.removeprefix(topology.inbox(""))
    if queue.startswith(topology.outbox("")):
        return topology.results, f"part.{queue.removeprefix(topology.outbox(''))}"
    return "", queue


def dropped(figures: QueueFigures | None, kept_now: int) -> int | None:
    """Return how many messages the bound has dropped; None where that cannot be told.

    What was published, less what was taken out, less what is there, as RabbitMQ's statistics have
    it: they begin anew when the broker starts, and are gathered every 5 seconds, so they count only
    where they know of just as many messages as there are.

    Args:
        figures: what the management API tells of the queue.
        kept_now: how many are in it, exactly.
    """
    if figures is None or figures.published is None or figures.settled is None:
        return None
    if figures.ready + (figures.unacknowledged or 0) != kept_now:
        return None
    left = figures.published - figures.settled - kept_now
    return left if left >= 0 else None


def _refused_by(delivery: Delivery, topology: Topology) -> str | None:
    """Return the worker that sent a message to where refused ones are kept; None: none did."""
    if delivery.exchange != topology.results:
        return None
    return delivery.keys[0].partition(".")[2]


async def _send_again(link: Link, topology: Topology, message: Rejected) -> Requeued:
    goes_to = destination(message, topology)
    if goes_to is None:
        return Requeued(message, left="its origin is unknown")
    exchange, key = goes_to
    delivery = message.reading.delivery
    if CUT in delivery.properties.headers:
        return Requeued(message, left=f"only the first {len(delivery.body)} bytes of it were kept")
    headers = {
        name: value
        for name, value in delivery.properties.headers.items()
        if name not in _ADDED and not name.startswith(_BY_BROKER)
    }
    try:
        again = delivery.properties._replace(headers=headers)
        await link.publish(delivery.body, again, exchange=exchange, keys=[key])
    except Unroutable:
        return Requeued(message, left=f"{message.queue or key} no longer exists")
    except QueueFull:
        return Requeued(message, left=f"{message.queue or key} is full")
    return Requeued(message, exchange, key)


async def _count(link: Link, topology: Topology) -> int:
    counts = await link.counts(topology.rejected)
    if counts is None:
        raise UsageError(
            f"{topology.rejected} does not exist: nobody of federation {topology.federation} "
            "has connected to this broker yet"
        )
    return counts.ready


async def _must_be_classic(link: Link, topology: Topology) -> None:
    queue = topology.find(topology.rejected)
    assert queue is not None
    if not await is_classic(link, queue):
        raise UsageError(
            f"{queue.name} is not a classic queue: reading it would count as failed "
            f"deliveries; 'fluffle journal --federation {topology.federation}' shows what was "
            "rejected, and 'fluffle rejected requeue --all' and 'purge' still work"
        )


def _no_such(topology: Topology, number: int, count: int) -> UsageError:
    there = f"choose 1 to {count}" if count else "it is empty"
    return UsageError(f"there is no message {number} in {topology.rejected}; {there}")
