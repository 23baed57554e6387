"""Checks on the messages that a worker receives, and the rejection of malformed ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.events import Rejected, RunEvent
from fluffle_common.protocol.messages import Evaluate, Fit, Message, Part, ToWorker
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import Assembly, announced_layout
from fluffle_common.protocol.wire_format import decode, read_groups
from fluffle_common.tensors.frozen import NO_FROZEN, Frozen
from fluffle_common.tensors.groups import EXTRA, FROZEN
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import Weights, check_finite
from fluffle_common.transport.base import Body, Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, reject

Record = Callable[[RunEvent], object]


def check_message(body: Body, federation: str) -> None:
    """Check a message for a worker in full, without acting on it.

    Raises:
        MalformedMessage: if the message is malformed or not for a worker.
    """
    message, payload = decode(body, federation)
    if not isinstance(message, ToWorker | Part):
        raise not_for_workers(message)
    if isinstance(message, Fit | Evaluate):
        if message.transfer is None:
            read_work(message, payload)
        else:
            announced_layout(message)
            Assembly(message.transfer)


def not_for_workers(message: Message) -> MalformedMessage:
    """Return the error for a message of a kind that is never sent to workers."""
    return MalformedMessage(f"a message of kind {message.kind} is not for workers", "kind")


class ReceivedTensors(NamedTuple):
    """The tensors that come with work: the model's, the strategy's extra ones, and frozen ones.

    The frozen tensors are not yet compared with their digest.
    """

    weights: Weights
    broadcast: Weights
    frozen: Frozen


def read_work(message: Fit | Evaluate, payload: memoryview) -> ReceivedTensors:
    """Return the tensors of a message; unknown groups of tensors are ignored.

    Raises:
        MalformedMessage: if the payload does not match the message's table of tensors, or a tensor
            is not finite.
    """
    groups = read_groups(message.tensors, payload)
    weights: Weights = groups[MODEL]
    broadcast: Weights = groups.get(EXTRA, {})
    try:
        check_finite(weights)
        check_finite(broadcast)
    except ValueError as wrong:
        raise MalformedMessage(str(wrong), "not_finite") from None
    frozen = NO_FROZEN
    if message.frozen is not None and FROZEN in groups:
        frozen = Frozen(message.frozen, groups[FROZEN])
    return ReceivedTensors(weights, broadcast, frozen)


class Refusals:
    """Forwards the messages that a worker rejects to ``F.rejected``, with cause and reason.

    A worker has no right to write to that queue, so rejected messages go through the results
    exchange under a key of the worker's own. If no coordinator has declared that yet, they are
    dropped. ``record`` is called with an event for each of them.
    """

    def __init__(self, topology: Topology, worker: str, record: Record) -> None:
        self._federation, self._results = topology.federation, topology.results
        self._route = Route(topology.results, [topology.rejecting(worker)])
        self._record = record

    async def refuse(self, link: Link, delivery: Delivery, wrong: MalformedMessage) -> None:
        """Forward a rejected message, if there is room for it."""
        self._record(Rejected(reason=str(wrong), cause=wrong.cause))
        if await link.exists(self._results):
            with contextlib.suppress(QueueFull, Unroutable):
                return await reject(link, delivery, wrong, self._route)
        delivery.ack()

    async def drain(self, link: Link, queue: str, check: Callable[[Body, str], object]) -> None:
        """Empty one of the worker's own queues, and refuse messages that ``check`` finds malformed.

        ``check`` is called with each body and the name of the federation.
        """
        counts = await link.counts(queue)
        for _ in range(counts.ready if counts is not None else 0):
            delivery = await link.get(queue)
            if delivery is None:
                return
            try:
                check(delivery.body, self._federation)
            except MalformedMessage as wrong:
                await self.refuse(link, delivery, wrong)
            else:
                delivery.ack()
