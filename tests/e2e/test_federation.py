"""Whole federations as separate processes: start order, late joining, crashes, resumption."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fluffle_broker.node import node
from tests import here
from tests.e2e.programs import ROOT, Federation
from tests.faults.harness import wait_until

pytestmark = pytest.mark.rabbit
WAITING = f"{ROOT / 'tests/e2e/waiting_task.py'}:task"


def history(federation: Federation) -> list[dict]:
    lines = (federation.run / "history.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "committed"]


def participants(line: dict) -> list[str]:
    return sorted(one["worker"] for one in line["participants"])


def test_worker_coordinator_broker_worker_worker(tmp_path: Path) -> None:
    """Everything is started before what it needs, and waits for it."""
    ports = node.Ports(*node.network.free_ports(5))
    url = f"amqp://guest:guest@127.0.0.1:{ports.amqp}/"
    federation = Federation("order", url, tmp_path)
    try:
        first = federation.worker("shard:0/3")
        first.wait_for("no broker at")
        coordinator = federation.coordinator("--quorum", 3, "--rounds", 2)
        coordinator.wait_for("no broker at")
        node.up(tmp_path / "state", ports=ports)
        first.wait_for("connected")
        others = [federation.worker(f"shard:{n}/3") for n in (1, 2)]
        assert [program.end() for program in (coordinator, first, *others)] == [0, 0, 0, 0]
    finally:
        federation.close()
        node.down(tmp_path / "state", grace_s=0)
    assert [participants(line) for line in history(federation)] == [
        ["shard-0-3", "shard-1-3", "shard-2-3"]
    ] * 2


def test_a_late_worker_takes_part_in_a_later_round(federation: Federation, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    env = {"WAIT_FOR": str(gate), "WAIT_FROM": "3"}
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 4, "--grace", 300)
    early = [federation.worker(f"shard:{n}/3", task=WAITING, env=env) for n in (0, 1)]
    coordinator.wait_for("round 3: opened for shard-0-3, shard-1-3")
    late = federation.worker("shard:2/3")
    coordinator.wait_for("round 3: update of shard-2-3 counted")
    gate.touch()
    assert [program.end() for program in (coordinator, *early, late)] == [0, 0, 0, 0]
    assert [participants(line) for line in history(federation)] == [
        ["shard-0-3", "shard-1-3"],
        ["shard-0-3", "shard-1-3"],
        ["shard-0-3", "shard-1-3", "shard-2-3"],
        ["shard-0-3", "shard-1-3", "shard-2-3"],
    ]


def test_a_killed_worker_does_not_stop_the_run_and_comes_back(
    federation: Federation, tmp_path: Path
) -> None:
    killed, back = tmp_path / "killed", tmp_path / "back"
    coordinator = federation.coordinator("--quorum", 2, "--min-workers", 3, "--rounds", 4)
    first = federation.worker("shard:0/3", task=WAITING, env={"WAIT_FOR": str(killed)})
    env = {"WAIT_FOR": str(back), "WAIT_FROM": "3"}
    second = federation.worker("shard:1/3", task=WAITING, env=env)
    victim = federation.worker("shard:2/3", task=WAITING, env={"WAIT_FOR": str(tmp_path / "x")})
    victim.wait_for("round 1: training")
    victim.send(signal.SIGKILL)
    assert victim.end() == -signal.SIGKILL
    killed.touch()
    coordinator.wait_for("round 2: committed with shard-0-3, shard-1-3")
    again = federation.worker("shard:2/3")
    coordinator.wait_for("round 3: update of shard-2-3 counted")
    back.touch()
    assert [program.end() for program in (coordinator, first, second, again)] == [0, 0, 0, 0]
    rounds = history(federation)
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    assert "shard-2-3" not in participants(rounds[0]) + participants(rounds[1])
    assert "shard-2-3" in participants(rounds[2])


def test_committed_weights_are_the_float64_average_of_what_was_sent(
    federation: Federation, tmp_path: Path
) -> None:
    record = tmp_path / "record"
    record.mkdir()
    env = {"RECORD": str(record)}
    coordinator = federation.coordinator("--quorum", 3, "--rounds", 3)
    workers = [federation.worker(f"shard:{n}/3", task=WAITING, env=env) for n in range(3)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0, 0]
    sent = [dict(np.load(path)) for path in record.iterdir()]
    assert len(sent) == 9
    for number in (1, 2, 3):
        base = load_file(federation.run / f"round-{number - 1:04d}.safetensors")
        committed = load_file(federation.run / f"round-{number:04d}.safetensors")
        these = [
            one
            for one in sent
            if all(np.array_equal(one[f"received {name}"], base[name]) for name in base)
        ]
        assert len(these) == 3
        total = sum(int(one["num_examples"]) for one in these)
        for name, tensor in committed.items():
            mean = (
                sum(
                    one["num_examples"] * one[f"trained {name}"].astype(np.float64) for one in these
                )
                / total
            )
            np.testing.assert_allclose(tensor, mean, rtol=1e-7)


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(
    federation: Federation, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = federation.coordinator("--quorum", 2, "--rounds", 3)
    workers = [
        federation.worker(f"shard:{n}/2", task=WAITING, env={"WAIT_FOR": str(gate)}) for n in (0, 1)
    ]
    workers[0].wait_for("round 1: training")
    first.send(signal.SIGINT)
    first.wait_for("the same command .* to continue")
    assert first.end() == 130
    second = federation.coordinator("--quorum", 2, "--rounds", 3)
    gate.touch()
    assert [program.end() for program in (second, *workers)] == [0, 0, 0]
    assert [line["round"] for line in history(federation)] == [1, 2, 3]


def test_a_second_worker_of_the_same_id_is_refused(federation: Federation) -> None:
    federation.worker("shard:0/2").wait_for("connected")
    second = federation.worker("shard:0/2", "--wait-id", 1)
    second.wait_for("another connection already uses this worker's ID; waiting up to 1 s")
    assert second.end() == 6
    (told,) = [line for line in second.lines if line.startswith("fluffle: ")]
    assert "another worker with the ID 'shard-0-2' is connected" in told


def test_a_worker_of_other_classes_is_refused(federation: Federation, tmp_path: Path) -> None:
    federation.coordinator("--classes", "x,y", "--quorum", 1).wait_for("connected")
    refused = federation.worker("shard:0/2")
    assert refused.end() == 6
    (told,) = [line for line in refused.lines if line.startswith("fluffle: ")]
    assert "has no classes, but the federation has x, y; " in told


def test_a_quorum_larger_than_the_workers_is_a_visible_wait(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 3)
    federation.worker("shard:0/3").wait_for("connected")
    told = coordinator.wait_for(r"waiting for workers: 1 of 3")
    assert "shard-0-3" in told


def test_queues_tell_of_the_federation(federation: Federation, broker_node: node.NodeInfo) -> None:
    federation.coordinator("--quorum", 3).wait_for("connected")
    federation.worker("shard:0/3").wait_for("joined run")

    def queues() -> dict[str, dict] | None:
        code, looked, _ = here.fluffle(
            "queues", "--federation", federation.name, "--url", federation.url, "--json",
            "--management", broker_node.management_url,
        )  # fmt: skip
        assert code == 0
        found = {queue["name"]: queue for queue in json.loads(looked)}
        return found if f"{federation.name}.inbox.shard-0-3" in found else None

    told = wait_until(queues, "RabbitMQ's list of queues, which may lag behind, has the inbox")
    assert "rejected" in told[f"{federation.name}.rejected"]["purpose"]
