"""Three RabbitMQ nodes on this machine that form one cluster, and that can be killed one by one."""

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
    """The nodes, by name; each has its state in a folder of its own.

    Args:
        folder: where everything is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cookie = secrets.token_hex(16)
        # Chosen together, as the nodes start side by side: four each, and the epmd of all three.
        epmd, *free = network.free_ports(1 + 4 * len(NAMES))
        self._ports = {
            name: node.Ports(*free[4 * i : 4 * i + 3], epmd, free[4 * i + 3])
            for i, name in enumerate(NAMES)
        }
        self.nodes: dict[str, node.NodeInfo] = {}

    def form(self) -> None:
        """Start the nodes and wait until each sees all.

        The first begins alone, so that there is one cluster to find; the others find it while they
        boot, which is quicker than stopping and resetting them to join.
        """
        self.start(NAMES[0])
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(self.start, NAMES[1:]))
        self.wait_whole()

    def start(self, name: str) -> None:
        """Start a node, with the data it has; one without data joins the first."""
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
        """Kill a node with -9."""
        pid = self.nodes.pop(name).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill whatever runs, epmd too."""
        for name in NAMES:
            node.down(self._folder / name, grace_s=0)

    def wait_whole(self) -> None:
        """Wait until every node sees all of them running."""
        everyone = {f"{name}@localhost" for name in NAMES}
        for name in NAMES:
            wait_until(
                lambda name=name: (
                    set(self.ctl("cluster_status", at=name)["running_nodes"]) == everyone
                ),
                f"{name} sees the three running",
            )

    def leader(self, queue: str) -> str:
        """Name the node that leads a replicated queue; "" while it has no leader."""
        told = self.ctl("list_queues", "name", "leader")
        leaders = [str(one["leader"]) for one in told if one["name"] == queue]
        return leaders[0].partition("@")[0] if leaders else ""

    def urls(self, first: int) -> str:
        """Return the URLs of all three, beginning with that of one, as ``--url`` takes them."""
        ports = [self._ports[name].amqp for name in (*NAMES[first:], *NAMES[:first])]
        return ",".join(f"amqp://guest:guest@127.0.0.1:{port}/" for port in ports)

    def ctl(self, *words: str, at: str | None = None) -> Any:
        """Ask a node that is up, with rabbitmqctl."""
        script = self._folder / (at or next(iter(self.nodes))) / "broker/rabbitmqctl"
        asked = [script, "--quiet", *words, "--formatter", "json"]
        return json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)


@contextlib.contextmanager
def three_nodes(folder: Path) -> Iterator[Cluster]:
    """Run a cluster meanwhile.

    Raises:
        BrokerError: where none can be started.
    """
    cluster = Cluster(folder)
    try:
        cluster.form()
        yield cluster
    finally:
        cluster.end()
