"""RabbitMQ's management API: what it tells of the queues of a federation.

Its statistics are gathered every few seconds (5 in RabbitMQ's own configuration), so what is told
here may be that old; AMQP itself (``Link.counts``) is exact, and tells less.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.urls import split_urls, tls_context, without_credentials

# What asking may raise, whatever is wrong with what answers.
UNTOLD = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
_SETTLED = ("ack", "get_no_ack", "deliver_no_ack")


@dataclass(frozen=True)
class QueueFigures:
    """One queue; None where it cannot be told.

    ``known`` says whether it is one of fluffle's. ``in_rate`` and ``out_rate`` count messages per
    second, published to the queue and handed out of it (redeliveries too). ``growth_rate`` is by
    how many messages per second ``ready`` grows. ``oldest_s`` is the age of the message at its
    head, in seconds. ``published`` and ``settled`` count messages since the broker started: what
    came in, and what was acknowledged or taken without an acknowledgement. ``limited`` says whether
    a policy bounds it, where one should.
    """

    name: str
    purpose: str
    ready: int
    unacknowledged: int | None
    consumers: int
    size_bytes: int | None
    type: str = "classic"
    known: bool = True
    in_rate: float | None = None
    out_rate: float | None = None
    growth_rate: float | None = None
    oldest_s: float | None = None
    published: int | None = None
    settled: int | None = None
    state: str = "running"
    limited: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def ask(
    base: str, path: str, url: str, *, put: Mapping[str, Any] | None = None, timeout_s: float = 5
) -> Any:
    """Get one answer, parsed; None where it is empty.

    Args:
        base: where the API is, without a slash at the end.
        path: what is asked, from ``/api/`` on.
        url: the broker's AMQP URL, for the user, the password and the options of TLS in it; of
            several, the first.
        put: what to put there; None only asks.
        timeout_s: how long to wait for the answer.

    Raises:
        OSError: where nothing answers, or not with success.
        http.client.HTTPException: where what answers does not speak HTTP.
        ValueError: where the answer is not JSON.
    """
    split = urllib.parse.urlsplit(split_urls(url)[0])
    user, password = (urllib.parse.unquote(s or "guest") for s in (split.username, split.password))
    login = base64.b64encode(f"{user}:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    body = None if put is None else json.dumps(put).encode()
    request = urllib.request.Request(  # noqa: S310 - http(s)
        base + path, body, headers, method="GET" if put is None else "PUT"
    )
    # Never by way of a proxy: it is the broker's own host, which AMQP reaches directly too; and
    # trusted as the URL says.
    context = tls_context(split_urls(url)[0])
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        *([urllib.request.HTTPSHandler(context=context)] if context else []),
    )
    try:
        with direct.open(request, timeout=timeout_s) as answer:
            text = answer.read()
    except urllib.error.HTTPError as no:
        no.close()  # it holds the connection
        raise
    return json.loads(text) if text else None


def management_base(url: str, given: str | None, record: Mapping[str, Any]) -> str:
    """Return where the management API of the broker at ``url`` should be.

    Args:
        url: the broker's AMQP URL.
        given: what the user said.
        record: what is noted of our own node.
    """
    if given:
        return given.rstrip("/")
    own = without_credentials(str(record.get("url"))) == without_credentials(url)
    if own and record.get("management_url"):
        return str(record["management_url"]).rstrip("/")
    split = urllib.parse.urlsplit(split_urls(url)[0])
    scheme, port = ("https", 15671) if split.scheme == "amqps" else ("http", 15672)
    host = split.hostname or ""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def queue_figures(url: str, base: str, topology: Topology) -> list[QueueFigures]:
    """Return the queues of a federation, by name.

    Args:
        url: the broker's AMQP URL, for the vhost, the user and the password in it.
        base: where its management API is.
        topology: the names of the federation.

    Raises:
        OSError, http.client.HTTPException, ValueError: see ``ask``.
        KeyError, TypeError: where the answer is not one of RabbitMQ's.
    """
    told = ask(base, f"/api/queues/{vhost(url)}", url)
    prefix = f"{topology.federation}."
    return [
        read_queue(queue, topology, time.time())
        for queue in sorted(told, key=lambda queue: str(queue["name"]))
        if queue["name"].startswith(prefix)
    ]


def alarms(url: str, base: str) -> list[str]:
    """Return what the broker has run out of, ``memory`` or ``disk``: meanwhile it takes nothing.

    Empty too where the user may not ask; see ``ask`` for what it raises.
    """
    try:
        nodes = ask(base, "/api/nodes", url)
    except urllib.error.HTTPError as no:  # takes the tag "monitoring"
        if no.code in (401, 403):
            return []
        raise
    words = {"mem_alarm": "memory", "disk_free_alarm": "disk"}
    return [word for alarm, word in words.items() if any(node.get(alarm) for node in nodes)]


def vhost(url: str) -> str:
    """Return the virtual host of an AMQP URL, quoted for a path of the API."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(split_urls(url)[0]).path[1:]) or "/"
    return urllib.parse.quote(name, safe="")


def read_queue(told: Mapping[str, Any], topology: Topology, now: float) -> QueueFigures:
    """Read what the API tells of one queue; a queue that is new may lack its statistics yet.

    Args:
        told: one object of ``/api/queues``.
        topology: the names of the federation.
        now: the time, in seconds since 1970.
    """
    # Where nothing has happened yet there are no statistics of it, but there is "messages".
    stats: Mapping[str, Any] | None = told.get("message_stats") or (
        {} if "messages" in told else None
    )
    purpose = topology.purpose(told["name"])
    oldest = told.get("head_message_timestamp")
    return QueueFigures(
        name=told["name"],
        purpose=purpose or "not one of fluffle's",
        ready=told.get("messages_ready", 0),
        unacknowledged=told.get("messages_unacknowledged", 0),
        consumers=told.get("consumers", 0),
        # Of a stream RabbitMQ does not say it.
        size_bytes=told.get("message_bytes") or (None if told.get("type") == "stream" else 0),
        type=told.get("type", "classic"),
        known=purpose is not None,
        in_rate=_rate(stats, "publish"),
        out_rate=_rate(stats, "deliver_get"),
        growth_rate=(told.get("messages_ready_details") or {}).get("rate"),
        oldest_s=max(0.0, now - oldest) if isinstance(oldest, int | float) else None,
        published=None if stats is None else stats.get("publish", 0),
        state=told.get("state", "running"),
        limited=_limited(told, topology),
        settled=None if stats is None else sum(stats.get(each, 0) for each in _SETTLED),
    )


def _limited(told: Mapping[str, Any], topology: Topology) -> bool | None:
    """Whether a policy bounds a queue that should be bounded, whoever made it, and whatever to."""
    queue = topology.find(told["name"])
    if queue is None or not queue.limits or "effective_policy_definition" not in told:
        return None
    return any(key.startswith("max-") for key in told["effective_policy_definition"] or {})


def _rate(stats: Mapping[str, Any] | None, what: str) -> float | None:
    if stats is None:
        return None
    return float((stats.get(f"{what}_details") or {}).get("rate", 0.0))
