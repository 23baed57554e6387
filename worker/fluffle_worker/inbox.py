"""What a worker takes as mail, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.codec import announced_layout, decode, read_groups
from fluffle_common.protocol.events import Rejected, RunEvent
from fluffle_common.protocol.messages import Evaluate, Fit, Message, Part, ToWorker
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer import Assembly
from fluffle_common.tensors.groups import EXTRA
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import Weights, check_finite
from fluffle_common.transport.base import Body, Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, reject

Tell = Callable[[RunEvent], object]

_MOST_WAITING = 100
_TRY_AGAIN_S = 0.05


def check_mail(body: Body, federation: str) -> None:
    """Check a message as thoroughly as if it were taken.

    Raises:
        MalformedMessage: where it would be refused.
    """
    message, payload = decode(body, federation)
    if not isinstance(message, ToWorker | Part):
        raise no_mail(message)
    if isinstance(message, Fit | Evaluate):
        if message.transfer is None:
            read_work(message, payload)
        else:
            announced_layout(message)
            Assembly(message.transfer, message.transfer.nbytes)


def no_mail(message: Message) -> MalformedMessage:
    """Return what is wrong with a message of a kind that workers are not sent."""
    return MalformedMessage(f"a message of kind {message.kind} is not for workers", "kind")


def read_work(message: Fit | Evaluate, payload: memoryview) -> tuple[Weights, Weights]:
    """Return the weights that work brings, and what the strategy broadcasts with them.

    Groups of tensors that are not known here are passed over.

    Raises:
        MalformedMessage: where they are not what the message says, or not finite.
    """
    groups = read_groups(message.tensors, payload)
    weights: Weights = groups[MODEL]
    broadcast: Weights = groups.get(EXTRA, {})
    try:
        check_finite(weights)
        check_finite(broadcast)
    except ValueError as wrong:
        raise MalformedMessage(str(wrong), "not_finite") from None
    return weights, broadcast


class Refusals:
    """What a worker refuses, on its way to where it is kept with the reason.

    A worker has no right to that queue itself: it sends under a key of its own, as all its results.
    While nobody has made what it sends to, refused mail waits here, unacknowledged.

    Args:
        topology: where it goes.
        worker: who refuses.
    """

    def __init__(self, topology: Topology, worker: str) -> None:
        self._results = topology.results
        self._route = Route(topology.results, [topology.rejecting(worker)])
        self._waiting: list[tuple[Delivery, MalformedMessage]] = []

    async def refuse(self, link: Link, delivery: Delivery, wrong: MalformedMessage) -> None:
        """Send it, or let it wait; of too many, the rest are dropped."""
        if await link.exists(self._results):
            await self._send(link, delivery, wrong)
        elif len(self._waiting) < _MOST_WAITING:
            self._waiting.append((delivery, wrong))
        else:
            delivery.ack()

    async def _send(self, link: Link, delivery: Delivery, wrong: MalformedMessage) -> None:
        while True:
            try:
                return await reject(link, delivery, wrong, self._route)
            except QueueFull:
                return delivery.ack()
            except Unroutable:  # a coordinator is making what it goes to: see ``Topology.shared``
                await asyncio.sleep(_TRY_AGAIN_S)

    async def send_waiting(self, link: Link) -> None:
        """Send what has waited."""
        waiting, self._waiting = self._waiting, []
        for delivery, wrong in waiting:
            await self.refuse(link, delivery, wrong)

    def forget(self) -> None:
        """Let go of what waits: it came over a link that is lost, and comes again."""
        self._waiting.clear()


async def drain(
    link: Link,
    queue: str,
    check: Callable[[Body], object],
    refusals: Refusals,
    tell: Tell,
) -> None:
    """Drop what is in a queue of ours; what ``check`` finds malformed is rejected."""
    there = await link.counts(queue)
    for _ in range(there.ready if there is not None else 0):
        delivery = await link.get(queue)
        if delivery is None:
            return
        try:
            check(delivery.body)
        except MalformedMessage as wrong:
            tell(Rejected(reason=str(wrong), cause=wrong.cause))
            await refusals.refuse(link, delivery, wrong)
        else:
            delivery.ack()
