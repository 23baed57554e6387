"""Looking into a federation's queues, changing nothing.

RabbitMQ's management API tells everything; where it cannot be reached, plain AMQP still tells how
many messages are ready in the queues whose names are known.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fluffle_broker.management import ask
from fluffle_common.amqp import AmqpTransport
from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.topology import Queue, Topology


@dataclass(frozen=True)
class QueueFigures:
    """One queue; None where it cannot be told."""

    name: str
    purpose: str
    ready: int
    unacknowledged: int | None
    consumers: int
    size_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def management_base(url: str, given: str | None, record: Mapping[str, Any]) -> str:
    """Return where the management API of the broker at ``url`` should be.

    Args:
        url: the broker's AMQP URL.
        given: what the user said.
        record: what is noted of our own node.
    """
    if given:
        return given.rstrip("/")
    if record.get("url") == url and record.get("management_url"):
        return str(record["management_url"]).rstrip("/")
    split = urllib.parse.urlsplit(url)
    scheme, port = ("https", 15671) if split.scheme == "amqps" else ("http", 15672)
    return f"{scheme}://{split.hostname}:{port}"


def look(url: str, base: str, topology: Topology) -> tuple[list[QueueFigures], str | None]:
    """Return the queues of a federation, and why some figures are missing, if they are.

    Raises:
        BrokerError: where the broker cannot be reached at all.
    """
    try:
        return _by_management(url, base, topology), None
    except (OSError, ValueError, KeyError) as why:
        reason = getattr(why, "reason", None) or why
        note = (
            f"the management API at {base} does not answer ({reason}): unacknowledged messages, "
            "bytes and workers' queues cannot be told; --management URL names another"
        )
    return asyncio.run(_by_amqp(url, topology)), note


def _by_management(url: str, base: str, topology: Topology) -> list[QueueFigures]:
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path[1:]) or "/"
    told = ask(base, f"/api/queues/{urllib.parse.quote(path, safe='')}", url)
    prefix = f"{topology.federation}."
    return [
        QueueFigures(
            name=queue["name"],
            purpose=topology.purpose(queue["name"]) or "not one of fluffle's",
            ready=queue.get("messages_ready", 0),
            unacknowledged=queue.get("messages_unacknowledged", 0),
            consumers=queue.get("consumers", 0),
            size_bytes=queue.get("message_bytes", 0),
        )
        for queue in sorted(told, key=lambda queue: str(queue["name"]))
        if queue["name"].startswith(prefix)
    ]


async def _by_amqp(url: str, topology: Topology) -> list[QueueFigures]:
    try:
        link = await AmqpTransport(url, "fluffle queues").open()
    except LinkLost as why:
        raise BrokerError(
            f"no broker at {AmqpTransport(url, '').address} ({why}); start one with "
            "'fluffle broker up' or name one with --url"
        ) from None
    try:
        found = []
        for entity in topology.shared():
            if isinstance(entity, Queue) and (counts := await link.counts(entity.name)) is not None:
                found.append(
                    QueueFigures(
                        entity.name, entity.purpose, counts.ready, None, counts.consumers, None
                    )
                )
        return sorted(found, key=lambda figures: figures.name)
    finally:
        await link.close()
