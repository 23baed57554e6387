"""What a worker takes as mail, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fluffle_common.errors import MalformedMessage
from fluffle_common.messages import Evaluate, Fit, Message, Part, ToWorker
from fluffle_common.topology import Topology
from fluffle_common.transfer import Route, reject
from fluffle_common.transport import Body, Delivery, Full, Link, Unroutable
from fluffle_common.weights import Weights, check_finite
from fluffle_common.wire import decode, read_tensors

Tell = Callable[[str, dict[str, Any]], None]


def check_mail(body: Body, federation: str) -> None:
    """Check a message as thoroughly as if it were taken.

    Raises:
        MalformedMessage: where it would be refused.
    """
    message, payload = decode(body, federation)
    if not isinstance(message, ToWorker | Part):
        raise no_mail(message)
    if isinstance(message, Fit | Evaluate) and message.transfer is None:
        weights_of(message, payload)


def no_mail(message: Message) -> MalformedMessage:
    """Return what is wrong with a message of a kind that workers are not sent."""
    return MalformedMessage(f"a message of kind {message.kind} is no mail for a worker", "kind")


def weights_of(message: Fit | Evaluate, payload: memoryview) -> Weights:
    """Return the weights that work brings.

    Raises:
        MalformedMessage: where they are not what the message says, or not finite.
    """
    weights = read_tensors(message.tensors, payload)
    try:
        check_finite(weights)
    except ValueError as wrong:
        raise MalformedMessage(str(wrong), "not_finite") from None
    return weights


async def refuse(
    link: Link, delivery: Delivery, wrong: MalformedMessage, topology: Topology, worker: str
) -> None:
    """Put what is no mail where it is kept with the reason, or drop it while that is not there.

    A worker has no right to the queue itself: it sends under a key of its own, as all its results.
    """
    route = Route(topology.results, [topology.rejecting(worker)])
    try:
        if await link.exists(topology.results):
            await reject(link, delivery, wrong, route)
    except (Full, Unroutable):
        pass
    delivery.ack()


async def drain(
    link: Link,
    queue: str,
    check: Callable[[Body], object],
    topology: Topology,
    *,
    worker: str,
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
            tell("rejected", {"reason": str(wrong)})
            await refuse(link, delivery, wrong, topology, worker)
        else:
            delivery.ack()
