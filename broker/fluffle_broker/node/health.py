"""Uptime and memory use of a node, from its management API."""

from __future__ import annotations

import urllib.parse

from fluffle_broker.node.record import NodeInfo
from fluffle_common.transport.rabbitmq.management import REQUEST_ERRORS, ask


def figures(info: NodeInfo) -> dict[str, float]:
    """Return a node's figures; empty if it has none yet, as in its first two seconds."""
    name = urllib.parse.quote(info.node_name, safe="")
    base = info.management_url.rstrip("/")
    try:
        stats = ask(base, f"/api/nodes/{name}", info.url)
        return {"uptime_s": stats["uptime"] / 1000, "memory_bytes": stats["mem_used"]}
    except REQUEST_ERRORS:
        return {}
