"""A vhost in which every user has exactly the permissions of its role."""

from __future__ import annotations

import urllib.parse
import uuid
from collections.abc import Iterable

from fluffle_broker.node.node import NodeInfo
from fluffle_broker.node.permissions import (
    NOTHING,
    Permissions,
    coordinator_permissions,
    worker_permissions,
)
from fluffle_common.protocol.topology import Topology
from tests.e2e.manage import add_vhost, manage

PASSWORD = "open-sesame"
COORDINATOR = "chief"


class Narrow:
    """A vhost for the federation ``f``."""

    def __init__(self, info: NodeInfo, workers: Iterable[str]) -> None:
        self._info = info
        self.topology = Topology("f")
        self.vhost = f"narrow-{uuid.uuid4().hex[:8]}"
        add_vhost(info, self.vhost)
        self.version = tuple(map(int, info.version.split(".")[:2]))
        if self.version >= (4, 3):
            # It refuses topic permissions while the exchange does not exist.
            arguments = {"alternate-exchange": self.topology.unrouted}
            results = {"type": "topic", "durable": True, "arguments": arguments}
            self._put(f"exchanges/{self.vhost}/{self.topology.results}", results)
        self.grant(coordinator_permissions(self.topology, COORDINATOR))
        for worker in workers:
            self.grant(worker_permissions(self.topology, worker))

    def grant(self, permissions: Permissions) -> None:
        """Create a user with these permissions."""
        self._put(f"users/{permissions.user}", {"password": PASSWORD, "tags": ""})
        self._grant(permissions.user, permissions)

    def url(self, user: str) -> str:
        """Return the URL with which a user logs in."""
        password = "guest" if user == "guest" else PASSWORD
        return f"amqp://{user}:{password}@127.0.0.1:{self._info.ports.amqp}/{self.vhost}"

    def close(self) -> None:
        """Delete the vhost and its contents."""
        manage(self._info, "DELETE", f"vhosts/{self.vhost}")

    def _grant(self, user: str, permissions: Permissions) -> None:
        allowed = {name: getattr(permissions, name) for name in ("configure", "write", "read")}
        self._put(f"permissions/{self.vhost}/{user}", allowed)
        for exchange, keys in permissions.topics.items():
            topic = {"exchange": exchange, "write": keys, "read": NOTHING}
            self._put(f"topic-permissions/{self.vhost}/{user}", topic)

    def _put(self, path: str, what: object) -> None:
        manage(self._info, "PUT", urllib.parse.quote(path), what)
