"""A worker that shares no code with fluffle takes part and is counted."""

import json
import sys

import pytest

from tests.e2e.programs import ROOT, Federation

pytestmark = pytest.mark.rabbit


def test_a_worker_written_from_the_protocol_is_counted(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 4)
    coordinator.wait_for("connected")
    ours = federation.worker("shard:0/3")
    coordinator.wait_for("shard-0-3 joined")  # it gives the first weights
    script = ROOT / "tests/e2e/pika_worker.py"
    assert len(script.read_text().splitlines()) < 60
    foreign = federation.start(sys.executable, script, federation.url, federation.name, "pika")
    assert [program.end() for program in (coordinator, ours, foreign)] == [0, 0, 0]
    lines = map(json.loads, (federation.run / "history.jsonl").read_text().splitlines())
    committed = [line for line in lines if line["event"] == "committed"]
    assert len(committed) == 4
    for line in committed:
        counted = {one["worker"]: one["num_examples"] for one in line["participants"]}
        assert counted["pika"] == 50
