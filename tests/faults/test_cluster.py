"""A cluster of three brokers loses its most important node, and the federation loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluffle_common.errors import BrokerError
from tests.faults.cluster import NAMES, Cluster, three_nodes
from tests.faults.harness import Federation, Program, wait_until
from tests.faults.test_recovery import Beat, assert_ended_well, rules

pytestmark = [pytest.mark.rabbit, pytest.mark.long]

QUORUM = ("--queue-type", "quorum")
WORKERS = 4
# For 70 s, RabbitMQ 4.3 does not say whether a failed node's lock is held.
FAILOVER_S = 180.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run three nodes."""
    try:
        with three_nodes(tmp_path_factory.mktemp("cluster")) as made:
            yield made
    except BrokerError as why:
        pytest.skip(f"NOT TESTED on a cluster, none can be started: {why}")


class ClusterFederation(Federation):
    """A federation on a cluster, observed through a running node."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        super().__init__(folder, "", 0, url=cluster.urls(0))
        self._cluster = cluster

    def queues(self) -> dict[str, dict[str, Any]]:
        """Return the counts from the queues; the management API repeats a dead leader's figures."""
        self.broker_url = next(iter(self._cluster.nodes.values())).url
        queues = self._cluster.ctl(
            "list_queues", "name", "messages_ready", "messages_unacknowledged"
        )
        return {
            one["name"].removeprefix(f"{self.name}."): {
                "ready": one["messages_ready"],
                "unacked": one["messages_unacknowledged"],
            }
            for one in queues
        }


@pytest.fixture
def federation(cluster: Cluster, tmp_path: Path) -> Iterator[ClusterFederation]:
    """Yield a federation whose processes know all nodes."""
    with ClusterFederation(tmp_path, cluster) as made:
        yield made


def test_the_leader_of_the_updates_is_killed_under_load_twice(
    cluster: Cluster, federation: Federation
) -> None:
    # One worker is slow, so that there is time to kill a node between the first counted update of a
    # round and its commit, while that update is unacknowledged.
    flags = (*rules(WORKERS), *QUORUM, "--config", "train_s=0.2", "--config", "slow_s=1.2")
    coordinator = federation.coordinator(*flags, "--rounds", 1000)
    coordinator.wait_for("connected")
    workers = [
        # Each begins with another node, so that some process is connected to the killed one.
        federation.worker(n, WORKERS, *Beat, *QUORUM, "--url", cluster.urls(n % len(NAMES)))
        for n in range(WORKERS)
    ]
    federation.wait_committed(2)
    first = kill_the_leader(cluster, federation, coordinator)
    federation.wait_committed(federation.committed() + 3, FAILOVER_S)
    assert any(program.events("disconnected") for program in (coordinator, *workers))

    cluster.start(first)
    cluster.wait_whole()
    second = kill_the_leader(cluster, federation, coordinator)
    assert second != first
    federation.wait_committed(federation.committed() + 3, FAILOVER_S)

    # While that node is down, the coordinator ends too, and another one finishes the run.
    assert all(program.alive() for program in (coordinator, *workers))
    coordinator.interrupt()
    coordinator.end()
    last = federation.coordinator(*flags, "--rounds", federation.committed() + 2)
    last.wait_for("connected", FAILOVER_S)
    assert_ended_well(federation, last, *workers)
    assert federation.committed() >= 10
    # No worker was restarted.
    assert all(len(program.events("loaded")) == 1 for program in workers)


def kill_the_leader(cluster: Cluster, federation: Federation, coordinator: Program) -> str:
    """Kill the leader of the updates queue while it holds updates; return its name."""
    updates = f"{federation.name}.updates"
    leader = wait_until(lambda: cluster.leader(updates), "the updates have a leader")
    number = federation.committed() + 2
    coordinator.wait_for("counted", round=number)
    cluster.kill(leader)
    assert federation.committed() == number - 1
    wait_until(lambda: cluster.leader(updates) not in ("", leader), "they have another leader")
    return str(leader)
