"""Asking RabbitMQ's management API."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from fluffle_broker.record import NodeInfo


@dataclass(frozen=True)
class Figures:
    """How a node is doing."""

    uptime_s: float
    memory_bytes: int


def ask(base: str, path: str, url: str, *, timeout_s: float = 5) -> Any:
    """Get one answer, parsed.

    Args:
        base: where the API is, without a slash at the end.
        path: what is asked, from ``/api/`` on.
        url: the broker's AMQP URL, for the user and the password in it.
        timeout_s: how long to wait for the answer.

    Raises:
        OSError: where nothing answers, or not with success.
        http.client.HTTPException: where what answers does not speak HTTP.
        ValueError: where the answer is not JSON.
    """
    split = urllib.parse.urlsplit(url)
    user, password = (urllib.parse.unquote(s or "guest") for s in (split.username, split.password))
    login = base64.b64encode(f"{user}:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {login}"}
    request = urllib.request.Request(base + path, headers=headers)  # noqa: S310 - http(s)
    # Never by way of a proxy: it is the broker's own host, which AMQP reaches directly too.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=timeout_s) as answer:
        return json.load(answer)


def figures(info: NodeInfo, *, timeout_s: float = 5) -> Figures | None:
    """Ask a node how it is doing; None where it does not tell, as in its first second or two."""
    name = urllib.parse.quote(info.node_name, safe="")
    base = info.management_url.rstrip("/")
    try:
        told = ask(base, f"/api/nodes/{name}", info.url, timeout_s=timeout_s)
        return Figures(uptime_s=told["uptime"] / 1000, memory_bytes=told["mem_used"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
