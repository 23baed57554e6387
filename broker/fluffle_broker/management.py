"""What a running node tells of itself over RabbitMQ's management API."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.parse
from dataclasses import dataclass

from fluffle_broker import network
from fluffle_broker.record import NodeInfo


@dataclass(frozen=True)
class Figures:
    """How a node is doing."""

    uptime_s: float
    memory_bytes: int


def figures(info: NodeInfo, *, timeout_s: float = 5) -> Figures | None:
    """Ask a node how it is doing; None where it does not tell, as in its first second or two."""
    name = urllib.parse.quote(info.node_name, safe="")
    link = http.client.HTTPConnection(network.LOOPBACK, info.ports.management, timeout=timeout_s)
    login = base64.b64encode(b"guest:guest").decode()
    try:
        link.request("GET", f"/api/nodes/{name}", headers={"Authorization": f"Basic {login}"})
        told = json.load(link.getresponse())
        return Figures(uptime_s=told["uptime"] / 1000, memory_bytes=told["mem_used"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        link.close()
