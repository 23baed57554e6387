"""A client of RabbitMQ's management API: queue statistics and alarms.

RabbitMQ refreshes its statistics every few seconds (5 by default), so the numbers may be that old.
``Link.counts`` is exact but reports less.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluffle_common.errors import UsageError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.urls import split_urls, tls_context

_TIMEOUT_S = 5.0
# Everything that a request may raise, besides ``UsageError``.
REQUEST_ERRORS = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
_SETTLED = ("ack", "get_no_ack", "deliver_no_ack")
# RabbitMQ samples every 5 s. Without this, its rates are 0 whenever the newest sample is older than
# collect_statistics_interval, which is 1 s in our own node. For lengths, it repeats that sample, so
# that only an average over several samples is not 0.
_RATES_OF_SAMPLES = "&msg_rates_age=5&msg_rates_incr=5&lengths_age=20&lengths_incr=5"
_PAGE_SIZE = 500  # the most that RabbitMQ allows
_LIMITED_FIGURES = {"max-length": "messages_ready", "max-length-bytes": "message_bytes_ready"}


@dataclass(frozen=True)
class QueueFigures:
    """The figures of one queue; None where a figure is unknown."""

    name: str
    purpose: str  # what fluffle uses it for, in words
    ready: int  # messages that wait for a consumer
    unacknowledged: int | None
    consumers: int
    size_bytes: int | None  # of all its messages
    type: str = "classic"  # or quorum, or stream
    known: bool = True  # whether fluffle uses a queue of this name
    in_rate: float | None = None  # messages published to it, per second
    out_rate: float | None = None  # messages delivered from it, per second, also repeatedly
    growth_rate: float | None = None  # the change of ``ready`` per second, averaged over 20 s
    oldest_s: float | None = None  # the age of the message at its head
    published: int | None = None  # since the broker started
    settled: int | None = None  # acknowledged, or delivered without, since then
    state: str = "running"  # or what is wrong with it
    limited: bool | None = None  # whether a policy limits its length; None if it needs no limit
    full: str | None = None  # the limit that makes it refuse messages now, in words


class Management:
    """A client of the management API at the URL ``base``.

    It uses the user, the password, the vhost and the TLS options of the broker's AMQP ``url``, the
    first if there are several.
    """

    def __init__(self, url: str, base: str) -> None:
        self.url, self.base = url, base.rstrip("/")
        self._node_url = split_urls(url)[0]
        split = urllib.parse.urlsplit(self._node_url)
        self.user, self._password = (
            urllib.parse.unquote(text or "guest") for text in (split.username, split.password)
        )
        self.vhost = urllib.parse.unquote(split.path[1:]) or "/"
        self.quoted_vhost = urllib.parse.quote(self.vhost, safe="")  # for a path of the API

    def ask(self, path: str, *, put: Mapping[str, Any] | None = None) -> Any:
        """Send one request and return the decoded JSON response; None if it is empty.

        ``path`` begins with ``/api/``. ``put`` is the body of a PUT request; without it, this is a
        GET request.

        Raises:
            OSError: if there is no response or it is not a success.
            http.client.HTTPException: if the response is not HTTP.
            ValueError: if the response is not JSON.
            UsageError: if a certificate file of the URL cannot be used.
        """
        login = base64.b64encode(f"{self.user}:{self._password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        body = None if put is None else json.dumps(put).encode()
        request = urllib.request.Request(  # noqa: S310 - http(s)
            self.base + path, body, headers, method="GET" if put is None else "PUT"
        )
        # AMQP reaches the broker's host directly, so HTTP bypasses any proxy, and uses the TLS
        # options of the AMQP URL.
        context = tls_context(self._node_url)
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            *([urllib.request.HTTPSHandler(context=context)] if context else []),
        )
        try:
            with direct.open(request, timeout=_TIMEOUT_S) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            error.close()  # the exception keeps the connection open
            raise
        return json.loads(text) if text else None

    def queues(self, pattern: str, query: str = "") -> list[dict[str, Any]]:
        """Return the descriptions of the queues whose names match a regular expression.

        RabbitMQ selects the queues, because it takes a second to describe 1,000 of them. Raises
        what ``ask`` raises.
        """
        # By default, RabbitMQ ignores case.
        name = urllib.parse.quote(f"(?-i:{pattern})", safe="")
        path = f"/api/queues/{self.quoted_vhost}?name={name}&use_regex=true{query}"
        queues: list[dict[str, Any]] = []
        for number in itertools.count(1):
            page = self.ask(f"{path}&page={number}&page_size={_PAGE_SIZE}")
            queues += page["items"]
            if number >= page["page_count"]:
                break
        return queues

    def queue_figures(self, topology: Topology, *, rates: bool = False) -> list[QueueFigures]:
        """Return the figures of a federation's queues, sorted by name.

        Without ``rates``, the rates are often 0; with it, the totals lag behind the other figures.

        Raises:
            OSError, http.client.HTTPException, ValueError, UsageError: as ``ask`` does.
            KeyError, TypeError: if the response does not have RabbitMQ's format.
        """
        pattern = f"^{re.escape(topology.federation)}\\."
        queues = self.queues(pattern, _RATES_OF_SAMPLES if rates else "")
        return [
            read_queue(queue, topology, time.time())
            for queue in sorted(queues, key=lambda queue: str(queue["name"]))
        ]

    def alarms(self) -> list[str]:
        """Return the broker's resource alarms, ``memory`` and ``disk``, which block publishers.

        The list is empty if the user may not see them. Raises what ``ask`` raises.
        """
        try:
            nodes = self.ask("/api/nodes")
        except urllib.error.HTTPError as error:  # the user needs the tag "monitoring"
            if error.code in (401, 403):
                return []
            raise
        words = {"mem_alarm": "memory", "disk_free_alarm": "disk"}
        return [word for alarm, word in words.items() if any(node.get(alarm) for node in nodes)]


def fault_and_remedy(why: Exception) -> tuple[str, str]:
    """Return what is wrong with the API after an error of a request, and the remedy.

    >>> fault_and_remedy(OSError("Connection refused"))
    ('does not answer (Connection refused)', 'give its address with --management')
    """
    if isinstance(why, urllib.error.HTTPError) and why.code in (401, 403):
        return "refuses this user", "give the user of --url the tag 'monitoring'"
    if isinstance(why, UsageError):
        return "cannot be used", str(why)
    reason = getattr(why, "reason", None) or why
    return f"does not answer ({reason})", "give its address with --management"


def check_base(given: str) -> None:
    """Raise ``UsageError`` if text is no URL of the API, or has a user: it gets the broker's."""
    _, at, host = given.rpartition("@")
    scheme = re.match(r"https?://", given, re.IGNORECASE)
    if at:
        raise UsageError(
            "the URL of the management API contains a user name; give "
            f"{scheme[0] if scheme else 'http://'}{host} instead, because fluffle logs in to this "
            "API with the user name and the password of --url"
        )
    if scheme is None:
        raise UsageError(
            "the value of --management or FLUFFLE_MANAGEMENT_URL is not the URL of a management "
            "API: it does not begin with http:// or https://; write http://host:15672"
        )


def management_base(url: str, record: Mapping[str, Any]) -> str:
    """Return the URL of the management API of the broker at the AMQP URL ``url``.

    ``record`` is the record of the private node (``fluffle_broker.node.record``).
    """
    split = urllib.parse.urlsplit(split_urls(url)[0])
    own = _address(urllib.parse.urlsplit(str(record.get("url")))) == _address(split)
    if own and record.get("management_url"):
        return str(record["management_url"])
    scheme, port = ("https", 15671) if split.scheme == "amqps" else ("http", 15672)
    host = split.hostname or ""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _address(url: urllib.parse.SplitResult) -> tuple[str | None, int]:
    """Return the host and port of a broker, which a URL may spell in several ways."""
    return "127.0.0.1" if url.hostname == "localhost" else url.hostname, url.port or 5672


def read_queue(entry: Mapping[str, Any], topology: Topology, now: float) -> QueueFigures:
    """Read the figures of one queue from its entry in ``/api/queues``; ``now`` is Unix time."""
    # A new queue has neither. One that was never used has "messages" but no "message_stats".
    stats: Mapping[str, Any] | None = entry.get("message_stats") or (
        {} if "messages" in entry else None
    )
    purpose = topology.purpose(entry["name"])
    oldest = entry.get("head_message_timestamp")
    growth: Mapping[str, Any] = entry.get("messages_ready_details") or {}
    return QueueFigures(
        name=entry["name"],
        purpose=purpose or "not a queue of fluffle",
        ready=entry.get("messages_ready", 0),
        unacknowledged=entry.get("messages_unacknowledged", 0),
        consumers=entry.get("consumers", 0),
        # RabbitMQ does not report the size of a stream.
        size_bytes=entry.get("message_bytes") or (None if entry.get("type") == "stream" else 0),
        type=entry.get("type", "classic"),
        known=purpose is not None,
        in_rate=_rate(stats, "publish"),
        out_rate=_rate(stats, "deliver_get"),
        growth_rate=growth.get("avg_rate", growth.get("rate")),
        oldest_s=max(0.0, now - oldest) if isinstance(oldest, int | float) else None,
        published=None if stats is None else stats.get("publish", 0),
        state=entry.get("state", "running"),
        limited=_limited(entry, topology),
        full=_full(entry),
        settled=None if stats is None else sum(stats.get(name, 0) for name in _SETTLED),
    )


def _limited(entry: Mapping[str, Any], topology: Topology) -> bool | None:
    """Return whether any policy limits the queue; None if it needs no limit."""
    queue = topology.find(entry["name"])
    if queue is None or not queue.limits or "effective_policy_definition" not in entry:
        return None
    return any(key.startswith("max-") for key in entry["effective_policy_definition"] or {})


def _full(entry: Mapping[str, Any]) -> str | None:
    """Return the limit of a policy that makes the queue refuse messages; None if it takes them."""
    policy: Mapping[str, Any] = entry.get("effective_policy_definition") or {}
    if not str(policy.get("overflow")).startswith("reject"):
        return None  # a full queue drops its oldest messages
    for limit, figure in _LIMITED_FIGURES.items():
        most = policy.get(limit)
        if isinstance(most, int) and entry.get(figure, 0) >= most:
            name = entry.get("operator_policy") or entry.get("policy")
            return f"{limit} {most:,} of policy {name}"
    return None


def _rate(stats: Mapping[str, Any] | None, what: str) -> float | None:
    if stats is None:
        return None
    return float((stats.get(f"{what}_details") or {}).get("rate", 0.0))
