"""The state of a federation's queues, read without changing them.

RabbitMQ's management API provides all figures. If it is unreachable, AMQP still provides the number
of ready messages and consumers of the queues whose names are known.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from fluffle_common.errors import BrokerError
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.base import AccessRefused, Counts, QueueInUse
from fluffle_common.transport.open_once import open_once
from fluffle_common.transport.rabbitmq.management import (
    REQUEST_ERRORS,
    Management,
    QueueFigures,
    fault_and_remedy,
)
from fluffle_common.transport.rabbitmq.queue_health import hint
from fluffle_common.transport.rabbitmq.transport import AmqpTransport


@dataclass(frozen=True)
class QueueOverview:
    """The figures of a federation's queues at one moment.

    ``alarms`` lists the broker's resource alarms. ``note`` says why figures are missing, if any
    are. ``others`` lists the broker's federations, if this one has not been created.
    """

    topology: Topology
    queues: list[QueueFigures]
    alarms: list[str]
    note: str | None = None
    others: tuple[str, ...] = ()

    @property
    def created(self) -> bool:
        """Whether a coordinator has created the federation; a worker creates only its queues."""
        return any(queue.name == self.topology.updates for queue in self.queues)

    def hint(self, queue: QueueFigures) -> str | None:
        """Return what is wrong with a queue; idle queues of an idle federation are all right.

        So are its presence messages, such as the last worker's goodbye, which soon expire.
        """
        idle = not queue.ready or queue.name == self.topology.presence
        if self.at_rest and queue.known and idle:
            return None
        return hint(queue, self.topology, self.alarms)

    @property
    def at_rest(self) -> bool:
        """Whether nobody is connected and no work is left, as before and after a run."""
        inbox = self.topology.inbox("")
        read = [
            queue
            for queue in self.queues
            if queue.name in (self.topology.updates, self.topology.presence)
            or queue.name.startswith(inbox)
        ]
        if self.note is not None:  # the workers' queues are unknown
            return False
        return not any(queue.consumers for queue in read) and not any(
            queue.ready for queue in read if queue.name != self.topology.presence
        )

    def short_name(self, queue: QueueFigures) -> str:
        """Return a queue's name without the federation."""
        return queue.name.removeprefix(f"{self.topology.federation}.")

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the queues as JSON objects."""
        return [{**asdict(queue), "hint": self.hint(queue)} for queue in self.queues]


def read_overview(api: Management, topology: Topology) -> QueueOverview:
    """Read the figures of a federation's queues; raise ``BrokerError`` if no broker answers."""
    try:
        figures = _with_counts(api.queue_figures(topology, rates=True), api.url)
        overview = QueueOverview(topology, figures, api.alarms())
        return overview if overview.created else replace(overview, others=_federations(api))
    except REQUEST_ERRORS as why:
        fault, remedy = fault_and_remedy(why)
        note = (
            f"the management API at {api.base} {fault}, so unacknowledged messages, bytes, rates, "
            f"ages and the workers' queues are unknown; {remedy}"
        )
    return QueueOverview(topology, _by_amqp(api.url, topology), [], note)


def _federations(api: Management) -> tuple[str, ...]:
    """Return the federations that a coordinator has created on the broker."""
    names = [str(queue["name"]) for queue in api.queues(r"^[^.]+\.updates$")]
    return tuple(sorted(name.partition(".")[0] for name in names))


def _with_counts(figures: list[QueueFigures], url: str) -> list[QueueFigures]:
    """Replace the figures of queues that RabbitMQ has no statistics of yet.

    It collects statistics every five seconds, so a newer queue would look empty and unused. It has
    none of a failed node's queues either, and takes 70 s to refuse to count one.
    """
    new = [
        queue.name
        for queue in figures
        if queue.known and queue.published is None and queue.state == "running"
    ]
    counted: dict[str, Counts | None] = {}
    if new:
        with contextlib.suppress(BrokerError):  # the statistics follow
            counted = asyncio.run(_counts(new, url))

    def exact(queue: QueueFigures) -> QueueFigures:
        if (counts := counted.get(queue.name)) is None:
            return queue
        known = replace(queue, ready=counts.ready, consumers=counts.consumers)
        return replace(known, unacknowledged=None, size_bytes=None)

    return list(map(exact, figures))


async def _counts(names: Iterable[str], url: str) -> dict[str, Counts | None]:
    counted: dict[str, Counts | None] = {}
    async with open_once(AmqpTransport(url, "fluffle queues")) as link:
        for name in names:
            try:
                counted[name] = await link.counts(name)
            except QueueInUse:  # exclusive, such as the queue of a tap
                continue
            except AccessRefused as refused:
                # Since RabbitMQ 4.2.6, a reader of the journal may count nothing else.
                raise BrokerError(
                    f"{refused.lacking}; give the user the tag 'monitoring', so that "
                    "fluffle can query the management API (--management)"
                ) from None
    return counted


def _by_amqp(url: str, topology: Topology) -> list[QueueFigures]:
    """Return what AMQP reports about the shared queues, sorted by name."""
    queues = {entity.name: entity for entity in topology.shared() if isinstance(entity, Queue)}
    counted = asyncio.run(_counts(queues, url))
    return [
        QueueFigures(
            name,
            queues[name].purpose,
            counts.ready,
            None,
            counts.consumers,
            None,
            type=str(queues[name].arguments.get("x-queue-type", "classic")),
        )
        for name, counts in sorted(counted.items())
        if counts is not None
    ]
