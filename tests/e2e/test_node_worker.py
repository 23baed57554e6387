"""A worker in JavaScript, written from docs/protocol.md alone, takes part and is counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pika
import pytest
from safetensors.numpy import load_file

from fluffle_broker.node import node
from fluffle_common.errors import BrokerError
from tests.e2e.programs import FLUFFLE, PATIENCE_S, ROOT, Federation, Program
from tests.shared import made_once

HERE = ROOT / "examples/node_worker"
NODE, NPM = shutil.which("node"), shutil.which("npm")
WAITING = f"{ROOT / 'tests/e2e/waiting_task.py'}:task"
EVERYBODY = ("--quorum", 3, "--min-workers", 3)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a copy of the worker, once for all jobs."""
    if NODE is None or NPM is None:
        pytest.skip("NOT TESTED with a worker in JavaScript: node or npm is missing")

    def install(folder: Path) -> None:
        without = shutil.ignore_patterns("node_modules")
        shutil.copytree(HERE, folder, ignore=without, dirs_exist_ok=True)
        quick = ("--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=20000")
        try:
            subprocess.run(
                [str(NPM), "ci", *quick],
                check=True,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=120,
            )
        except subprocess.SubprocessError as why:  # the packages are npm's to give, not ours
            output = getattr(why, "stderr", None) or why
            pytest.skip(f"NOT TESTED with a worker in JavaScript, npm ci failed: {output}")

    return made_once(tmp_path_factory, "node_worker", install)


def start(federation: Federation, installed: Path, *flags: object) -> Program:
    """Start the worker in JavaScript, with the third shard."""
    names = ("--federation", federation.name, "--id", "js", "--shard", "2/3", "--heartbeat", 0.2)
    return federation.start(NODE, installed / "worker.js", "--url", federation.url, *names, *flags)


def history_lines(federation: Federation, event: str) -> list[dict[str, Any]]:
    lines = (federation.run / "history.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def counted(federation: Federation) -> list[dict[str, int]]:
    """Return who was counted in each round, with how many examples."""
    return [
        {one["worker"]: one["num_examples"] for one in line["participants"]}
        for line in history_lines(federation, "committed")
    ]


def test_it_reads_the_vectors(installed: Path) -> None:
    vectors = str(ROOT / "docs/protocol/vectors.json")
    done = subprocess.run(
        [str(NODE), "--test"],
        check=False,
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
def test_it_is_counted_in_every_round(federation: Federation, installed: Path, queues: str) -> None:
    kind = ("--queue-type", queues)
    foreign = start(federation, installed, *kind)  # before there is a coordinator
    ours = [federation.worker(f"shard:{n}/3", *kind) for n in (0, 1)]
    coordinator = federation.coordinator(
        *EVERYBODY, "--rounds", 5, "--config", "learning_rate=0.3", *kind
    )
    assert [program.end() for program in (coordinator, foreign, *ours)] == [0] * 4
    assert counted(federation) == [{"js": 90, "shard-0-3": 90, "shard-1-3": 90}] * 5
    assert all(line["rejected"] == 0 for line in history_lines(federation, "committed"))
    evaluated = history_lines(federation, "evaluated")
    assert all("js" in line["evaluators"] for line in evaluated)
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]
    last = load_file(federation.run / "round-0005.safetensors")
    np.testing.assert_allclose(last["slopes"], [2.0, -3.0, 0.5], atol=0.2)
    np.testing.assert_allclose(last["intercept"], 4.0, atol=0.2)


@pytest.mark.rabbit
def test_it_meets_every_requirement_of_the_document(
    federation: Federation, installed: Path
) -> None:
    where = ("--federation", federation.name, "--url", federation.url)
    check = federation.start(FLUFFLE, "conformance", *where, "--large", "--twice", "--patience", 30)
    first = start(federation, installed, "--heartbeat", 1)
    check.wait_for("start worker js once more")
    assert first.end() == 0
    second = start(federation, installed)
    assert check.end() == 0, "\n".join(check.lines)
    assert check.lines[-1] == "30 ok, 0 failed, 2 skipped"
    assert not any("user_id" in line for line in check.lines)
    assert second.end() == 1  # refused


@pytest.mark.rabbit
def test_alone_it_makes_the_first_weights_and_leaves_when_told(
    federation: Federation, installed: Path
) -> None:
    coordinator = federation.coordinator("--quorum", 1, "--rounds", 50)
    foreign = start(federation, installed, "--pause", 0.5)
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
    coordinator = federation.coordinator("--quorum", 2, "--min-workers", 1, "--rounds", 4)
    ours = federation.worker("shard:0/3", task=large)
    coordinator.wait_for("asking shard-0-3 for the first weights")
    foreign = start(federation, installed, "--pause", 0.5)
    foreign.wait_for("fit 2")
    # As if a round had lasted longer than its outbox lives.
    with pika.BlockingConnection(pika.URLParameters(federation.url)) as connection:
        connection.channel().queue_delete(f"{federation.name}.outbox.js")
    assert [program.end() for program in (coordinator, foreign, ours)] == [0] * 3
    assert [set(one) for one in counted(federation)] == [{"js", "shard-0-3"}] * 4
    assert all(line["rejected"] == 0 for line in history_lines(federation, "committed"))
    evaluated = history_lines(federation, "evaluated")
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]


class Coordinator:
    """What the document says of a coordinator, message by message, over pika."""

    def __init__(self, federation: Federation) -> None:
        self.name = federation.name
        self.connection = pika.BlockingConnection(pika.URLParameters(federation.url))
        self.channel = self.connection.channel()
        results = f"{self.name}.results"
        self.channel.exchange_declare(results, "topic", durable=True)
        self.channel.queue_declare("heard-" + self.name, exclusive=True)
        self.channel.queue_bind("heard-" + self.name, results, "#")

    def send(self, kind: str, payload: bytes = b"", **fields: Any) -> None:
        header = {"protocol": 2, "federation": self.name, "kind": kind, "run": "r", **fields}
        body = msgpack.packb([header, payload])
        self.channel.basic_publish("", f"{self.name}.inbox.js", body)

    def fit(self, number: int = 1, base: str = "b", **fields: Any) -> None:
        plan = {"epochs": 1, "batch_size": 32, "seed": 0}
        weights = np.zeros(3, np.float32).tobytes()
        entry = {"name": "w", "dtype": "float32", "shape": [3], "offset": 0, "nbytes": 12}
        scalar = {"name": "b", "dtype": "float32", "shape": [], "offset": 64, "nbytes": 4}
        more = {"round": number, "base": base, "evaluate": False, "plan": plan, **fields}
        self.send("fit", weights.ljust(68, b"\0"), tensors=[entry, scalar], **more)

    def hear(
        self, *kinds: str, patience_s: float = PATIENCE_S
    ) -> tuple[Any, dict[str, Any], bytes]:
        """Return the next message of one of these kinds: its properties, header and payload."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            _, properties, body = self.channel.basic_get("heard-" + self.name, auto_ack=True)
            if body is None:
                time.sleep(0.02)
                continue
            header, payload = msgpack.unpackb(body)
            if header["kind"] in kinds:
                return properties, header, payload
        raise AssertionError(f"no {kinds}")


@pytest.mark.rabbit
def test_what_it_does_with_each_kind_of_mail(federation: Federation, installed: Path) -> None:
    work = ("update", "failure", "evaluation")
    foreign = start(federation, installed)
    foreign.wait_for("at the broker")
    coordinator = Coordinator(federation)
    _, hello, _ = coordinator.hear("hello")
    assert hello["state"] == "idle"
    coordinator.send("welcome", round=0, rounds=9, later="a key of a later version")
    coordinator.fit()
    properties, first, delta = coordinator.hear(*work)
    assert (first["round"], first["base"], first["num_examples"]) == (1, "b", 90)
    assert properties.message_id == "update/r/1/js"
    assert (properties.delivery_mode, properties.type) == (2, "update")
    foreign.wait_for("sent 1")  # before that, it is at work, and ignores the same fit
    coordinator.fit()  # the same again: the same update again
    assert coordinator.hear(*work)[1:] == (first, delta)
    foreign.wait_for("sent 1")
    coordinator.fit(attempt=1)  # a higher attempt: trained anew
    _, second, _ = coordinator.hear(*work)
    assert second["seconds"] != first["seconds"]
    foreign.wait_for("sent 1")
    verdict = {"round": 1, "base": "b", "outcome": "rejected", "reason": "", "cause": "norm"}
    coordinator.send("verdict", **verdict)
    coordinator.fit(attempt=1)
    assert coordinator.hear(*work)[1] == second
    foreign.wait_for("sent 1")
    coordinator.send("verdict", **verdict, train_again=True)
    coordinator.fit(attempt=1)
    assert coordinator.hear(*work)[1]["seconds"] != second["seconds"]
    coordinator.fit(1, "another")  # opened again from other weights
    assert coordinator.hear(*work)[1]["base"] == "another"
    coordinator.fit(2, evaluate=True)
    heard = [coordinator.hear(*work)[1] for _ in range(2)]
    assert [(one["kind"], one["round"]) for one in heard] == [("evaluation", 1), ("update", 2)]
    # Passed over: what is malformed, of another federation, of an unknown kind or of a stranger.
    coordinator.fit(3, plan={"epochs": 0, "batch_size": 1, "seed": 0})
    coordinator.fit(3, federation="another")
    coordinator.send("later")
    coordinator.send("refusal", session="another", reason="")
    coordinator.send("stop", run="another", round=1, outcome="stopped", reason="")
    coordinator.fit(4, critical=["later"], later=1)  # refused, and that is said
    _, failure, _ = coordinator.hear(*work)
    assert (failure["kind"], failure["round"]) == ("failure", 4)
    assert "later" in failure["reason"]
    _, alive, _ = coordinator.hear("heartbeat")
    assert alive["session"] == hello["session"]
    assert (alive["run"], alive["round"], alive["state"]) == ("r", 2, "idle")
    foreign.send(signal.SIGINT)
    assert coordinator.hear("bye")[1]["session"] == hello["session"]
    assert foreign.end() == 0
    coordinator.connection.close()


@pytest.mark.rabbit
def test_the_newest_work_wins(federation: Federation, installed: Path) -> None:
    foreign = start(federation, installed, "--pause", 0.5)
    foreign.wait_for("at the broker")
    coordinator = Coordinator(federation)
    coordinator.hear("hello")
    endless = {"epochs": 1000, "batch_size": 32, "seed": 0}
    coordinator.fit(1, plan=endless)
    foreign.wait_for("fit 1")
    while coordinator.hear("heartbeat")[1]["step"] < 1:
        pass
    coordinator.fit(1, plan=endless)
    foreign.wait_for("at round 1 already")
    coordinator.fit(2)
    assert coordinator.hear("update")[1]["round"] == 2
    coordinator.send("refusal", session=coordinator.hear("heartbeat")[1]["session"], reason="no")
    foreign.wait_for("refused: no")
    assert foreign.end() == 1
    coordinator.connection.close()


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
        gate = tmp_path / "gate"
        env = {"WAIT_FOR": str(gate), "WAIT_FROM": "3"}
        ours = [federation.worker(f"shard:{n}/3", task=WAITING, env=env) for n in (0, 1)]
        foreign.wait_for("fit 3")
        assert info.pid is not None
        os.kill(info.pid, signal.SIGKILL)
        foreign.wait_for("no broker")
        info = node.up(state, ports=info.ports)
        foreign.wait_for("connected")
        gate.touch()
        assert [program.end() for program in (coordinator, foreign, *ours)] == [0] * 4
        assert [set(one) for one in counted(federation)] == [{"js", "shard-0-3", "shard-1-3"}] * 6
    finally:
        federation.close()
        node.down(state, grace_s=0)
