"""Uptime and memory use of a node, from its management API."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

from fluffle_broker.node.record import NodeInfo
from fluffle_common.transport.rabbitmq.management import REQUEST_ERRORS, ask


@dataclass(frozen=True)
class Figures:
    """The health figures of a node."""

    uptime_s: float
    memory_bytes: int


def figures(info: NodeInfo) -> Figures | None:
    """Return a node's figures; None if it has none yet, as in its first two seconds."""
    name = urllib.parse.quote(info.node_name, safe="")
    base = info.management_url.rstrip("/")
    try:
        stats = ask(base, f"/api/nodes/{name}", info.url)
        return Figures(uptime_s=stats["uptime"] / 1000, memory_bytes=stats["mem_used"])
    except REQUEST_ERRORS:
        return None
