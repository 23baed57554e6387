"""Looking into a federation's queues, changing nothing.

RabbitMQ's management API tells everything; where it cannot be reached, plain AMQP still tells how
many messages are ready in the queues whose names are known.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.base import Counts
from fluffle_common.transport.once import open_once
from fluffle_common.transport.rabbitmq.management import UNTOLD, QueueFigures, alarms, queue_figures
from fluffle_common.transport.rabbitmq.queue_health import hint
from fluffle_common.transport.rabbitmq.transport import AmqpTransport


@dataclass(frozen=True)
class Look:
    """What one look found.

    ``alarms`` is what the broker has run out of, ``note`` why some figures are missing, if they
    are.
    """

    topology: Topology
    queues: list[QueueFigures]
    alarms: list[str]
    note: str | None = None

    def hint(self, queue: QueueFigures) -> str | None:
        """Say what is off with a queue; that nobody is connected at all is no fault of a queue."""
        if self.at_rest and not queue.ready and queue.known:
            return None
        return hint(queue, self.topology, self.alarms)

    @property
    def at_rest(self) -> bool:
        """Whether nobody is connected and no work is left, as before a run and after its end."""
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
        """Return a queue's name without the federation's."""
        return queue.name.removeprefix(f"{self.topology.federation}.")

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the queues for JSON."""
        return [{**queue.as_dict(), "hint": self.hint(queue)} for queue in self.queues]


def look(url: str, base: str, topology: Topology) -> Look:
    """Look at the queues of a federation.

    Raises:
        BrokerError: where the broker cannot be reached at all.
    """
    try:
        found = queue_figures(url, base, topology)
        return Look(topology, _with_counts(found, url), alarms(url, base))
    except UNTOLD as why:
        reason = getattr(why, "reason", None) or why
        note = (
            f"the management API at {base} does not answer ({reason}): unacknowledged messages, "
            "bytes, rates, ages and the workers' queues are unknown; name the right address with "
            "--management"
        )
    return Look(topology, asyncio.run(_by_amqp(url, topology)), [], note)


def _with_counts(found: list[QueueFigures], url: str) -> list[QueueFigures]:
    """Count what is in queues, and who reads them, where RabbitMQ has no statistics of them yet.

    It gathers those every five seconds; a queue that is newer looks empty and deserted.
    """
    new = [queue.name for queue in found if queue.known and queue.published is None]
    counted = asyncio.run(_counts(new, url)) if new else {}
    return [
        replace(queue, ready=counts.ready, consumers=counts.consumers)
        if (counts := counted.get(queue.name)) is not None
        else queue
        for queue in found
    ]


async def _counts(names: list[str], url: str) -> dict[str, Counts | None]:
    async with open_once(AmqpTransport(url, "fluffle queues")) as link:
        return {name: await link.counts(name) for name in names}


async def _by_amqp(url: str, topology: Topology) -> list[QueueFigures]:
    found = []
    async with open_once(AmqpTransport(url, "fluffle queues")) as link:
        for entity in topology.shared():
            if isinstance(entity, Queue) and (counts := await link.counts(entity.name)) is not None:
                found.append(
                    QueueFigures(
                        entity.name,
                        entity.purpose,
                        counts.ready,
                        None,
                        counts.consumers,
                        None,
                        type=str(entity.arguments.get("x-queue-type", "classic")),
                    )
                )
    return sorted(found, key=lambda figures: figures.name)
