"""How a node is doing, as its management API tells."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

from fluffle_broker.node.record import NodeInfo
from fluffle_common.transport.rabbitmq.management import UNTOLD, ask


@dataclass(frozen=True)
class Figures:
    """How a node is doing."""

    uptime_s: float
    memory_bytes: int


def figures(info: NodeInfo, *, timeout_s: float = 5) -> Figures | None:
    """Ask a node how it is doing; None where it does not tell, as in its first second or two."""
    name = urllib.parse.quote(info.node_name, safe="")
    base = info.management_url.rstrip("/")
    try:
        told = ask(base, f"/api/nodes/{name}", info.url, timeout_s=timeout_s)
        return Figures(uptime_s=told["uptime"] / 1000, memory_bytes=told["mem_used"])
    except UNTOLD:
        return None
