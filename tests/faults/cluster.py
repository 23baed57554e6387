"""A cluster of three RabbitMQ nodes on this machine that can be killed one by one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fluffle_broker.node import network, node
from tests.faults.harness import wait_until

NAMES = ("rabbit1", "rabbit2", "rabbit3")


class Cluster:
    """A cluster of named nodes, each with its own state folder.

    Args:
        folder: the folder of the state folders.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cookie = secrets.token_hex(16)
        # Reserve all ports at once, because the nodes start in parallel: four each, one for epmd.
        epmd, *free = network.free_ports(1 + 4 * len(NAMES))
        self._ports = {
            name: node.Ports(*free[4 * i : 4 * i + 3], epmd, free[4 * i + 3])
            for i, name in enumerate(NAMES)
        }
        self.nodes: dict[str, node.NodeInfo] = {}

    def form(self) -> None:
        """Start the nodes and wait until each sees all others.

        The first starts alone and forms the cluster; the others join while they boot, which is
        faster than to stop and reset them.
        """
        self.start(NAMES[0])
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(self.start, NAMES[1:]))
        self.wait_whole()

    def start(self, name: str) -> None:
        """Start a node with its existing data; a node without data joins the first."""
        peers = (
            "cluster_formation.peer_discovery_backend = classic_config\n"
            f"cluster_formation.classic_config.nodes.1 = {NAMES[0]}@localhost\n"
        )
        self.nodes[name] = node.up(
            self._folder / name,
            ports=self._ports[name],
            node_name=name,
            cookie=self._cookie,
            extra_conf="" if name == NAMES[0] else peers,
        )

    def kill(self, name: str) -> None:
        """Kill a node with ``kill -9``."""
        pid = self.nodes.pop(name).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill all nodes and epmd."""
        for name in NAMES:
            node.down(self._folder / name, grace_s=0)

    def wait_whole(self) -> None:
        """Wait until every node sees all nodes running."""
        everyone = {f"{name}@localhost" for name in NAMES}
        for name in NAMES:
            wait_until(
                lambda name=name: (
                    set(self.ctl("cluster_status", at=name)["running_nodes"]) == everyone
                ),
                f"{name} sees the three running",
            )

    def leader(self, queue: str) -> str:
        """Return the name of the leader of a quorum queue; "" while it has none."""
        queues = self.ctl("list_queues", "name", "leader")
        leaders = [str(one["leader"]) for one in queues if one["name"] == queue]
        return leaders[0].partition("@")[0] if leaders else ""

    def urls(self, first: int) -> str:
        """Return the URLs of all nodes for ``--url``, beginning with the given node's."""
        ports = [self._ports[name].amqp for name in (*NAMES[first:], *NAMES[:first])]
        return ",".join(f"amqp://guest:guest@127.0.0.1:{port}/" for port in ports)

    def ctl(self, *words: str, at: str | None = None) -> Any:
        """Run rabbitmqctl against a running node."""
        script = self._folder / (at or next(iter(self.nodes))) / "broker/rabbitmqctl"
        asked = [script, "--quiet", *words, "--formatter", "json"]
        return json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)


@contextlib.contextmanager
def three_nodes(folder: Path) -> Iterator[Cluster]:
    """Run a cluster for the duration of the context.

    Raises:
        BrokerError: if it cannot be started.
    """
    cluster = Cluster(folder)
    try:
        cluster.form()
        yield cluster
    finally:
        cluster.end()
