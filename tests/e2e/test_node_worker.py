"""A worker in JavaScript, written from docs/protocol.md alone, takes part and is counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fluffle_broker.node import node
from fluffle_common.errors import BrokerError
from tests.e2e.programs import ROOT, Federation, Program

HERE = ROOT / "examples/node_worker"
NODE, NPM = shutil.which("node"), shutil.which("npm")
EVERYBODY = ("--quorum", 3, "--min-workers", 3)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a copy of the worker, once."""
    if NODE is None or NPM is None:
        pytest.skip("NOT TESTED with a worker in JavaScript: node or npm is missing")
    copy = tmp_path_factory.mktemp("node") / "worker"
    shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns("node_modules"))
    command = [NPM, "ci", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    if done.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"NOT TESTED with a worker in JavaScript, npm ci failed: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return copy


def start(federation: Federation, installed: Path, *flags: object) -> Program:
    """Start the worker in JavaScript, with the third shard."""
    names = ("--federation", federation.name, "--id", "js", "--shard", "2/3", "--heartbeat", 0.2)
    return federation.start(
        NODE, installed / "worker.js", "--url", federation.url, *names, *flags
    )


def told(federation: Federation, event: str) -> list[dict[str, Any]]:
    lines = (federation.run / "history.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def counted(federation: Federation) -> list[dict[str, int]]:
    """Return who was counted in each round, with how many examples."""
    return [
        {one["worker"]: one["num_examples"] for one in line["participants"]}
        for line in told(federation, "committed")
    ]


def test_it_reads_the_vectors(installed: Path) -> None:
    vectors = str(ROOT / "docs/protocol/vectors.json")
    done = subprocess.run(
        [str(NODE), "--test"],
        cwd=installed,
        env={**os.environ, "VECTORS": vectors},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout


def test_the_lock_names_no_registry() -> None:
    lock = json.loads((HERE / "package-lock.json").read_text())
    assert not any("resolved" in package for package in lock["packages"].values())
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]
    assert wanted == lock["packages"][""]["dependencies"]
    assert all(version[0].isdigit() for version in wanted.values())


@pytest.mark.rabbit
@pytest.mark.parametrize("queues", ["classic", "quorum"])
def test_it_is_counted_in_every_round(
    federation: Federation, installed: Path, queues: str
) -> None:
    kind = ("--queue-type", queues)
    foreign = start(federation, installed, *kind)  # before there is a coordinator
    ours = [federation.worker(f"shard:{n}/3", *kind) for n in (0, 1)]
    coordinator = federation.coordinator(
        *EVERYBODY, "--rounds", 5, "--config", "learning_rate=0.3", *kind
    )
    assert [program.end() for program in (coordinator, foreign, *ours)] == [0] * 4
    assert counted(federation) == [{"js": 90, "shard-0-3": 90, "shard-1-3": 90}] * 5
    assert all(line["rejected"] == 0 for line in told(federation, "committed"))
    evaluated = told(federation, "evaluated")
    assert all("js" in line["evaluators"] for line in evaluated)
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]
    last = load_file(federation.run / "round-0005.safetensors")
    np.testing.assert_allclose(last["slopes"], [2.0, -3.0, 0.5], atol=0.2)
    np.testing.assert_allclose(last["intercept"], 4.0, atol=0.2)


@pytest.mark.rabbit
def test_alone_it_makes_the_first_weights_and_leaves_when_told(
    federation: Federation, installed: Path
) -> None:
    coordinator = federation.coordinator("--quorum", 1, "--rounds", 50)
    foreign = start(federation, installed, "--pause", 0.05)
    coordinator.wait_for("asking js for the first weights")
    foreign.wait_for("sent 2")
    foreign.send(signal.SIGTERM)
    coordinator.wait_for("js.*got SIGTERM")
    assert foreign.end() == 0
    again = start(federation, installed)
    assert [program.end() for program in (coordinator, again)] == [0, 0]
    assert counted(federation) == [{"js": 90}] * 50


@pytest.mark.rabbit
def test_large_models_and_updates_travel_in_parts(federation: Federation, installed: Path) -> None:
    large = f"{ROOT / 'tests/e2e/large_task.py'}:task"
    coordinator = federation.coordinator("--quorum", 2, "--min-workers", 2, "--rounds", 3)
    foreign = start(federation, installed)
    ours = federation.worker("shard:0/3", task=large)
    assert [program.end() for program in (coordinator, foreign, ours)] == [0] * 3
    assert [set(one) for one in counted(federation)] == [{"js", "shard-0-3"}] * 3
    assert all(line["rejected"] == 0 for line in told(federation, "committed"))
    evaluated = told(federation, "evaluated")
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]


@pytest.mark.rabbit
def test_a_second_one_of_its_name_is_turned_away(federation: Federation, installed: Path) -> None:
    start(federation, installed).wait_for("at the broker")
    second = start(federation, installed)
    second.wait_for("another worker is called js")
    assert second.end() == 1


@pytest.mark.rabbit
def test_it_outlives_a_broker_that_is_killed(tmp_path: Path, installed: Path) -> None:
    state = tmp_path / "broker"
    try:
        info = node.up(state, ports=node.Ports(0, 0, 0, 0, 0))
    except BrokerError as why:
        pytest.skip(f"NOT TESTED against a broker that is killed, none can be started: {why}")
    federation = Federation("killed", info.url, tmp_path)
    try:
        coordinator = federation.coordinator(*EVERYBODY, "--rounds", 6)
        foreign = start(federation, installed, "--pause", 0.3)
        ours = [federation.worker(f"shard:{n}/3") for n in (0, 1)]
        foreign.wait_for("fit 3")
        assert info.pid is not None
        os.kill(info.pid, signal.SIGKILL)
        foreign.wait_for("no broker")
        info = node.up(state, ports=info.ports)
        foreign.wait_for("connected")
        assert [program.end() for program in (coordinator, foreign, *ours)] == [0] * 4
        assert [set(one) for one in counted(federation)] == [{"js", "shard-0-3", "shard-1-3"}] * 6
    finally:
        federation.close()
        node.down(state, grace_s=0)
