"""A worker that shares no code with fluffle takes part and is counted."""

import json
import sys

import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file

from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.wire_format import decode, read_tensors
from tests.e2e.programs import ROOT, Federation

SCRIPT = ROOT / "tests/e2e/pika_worker.py"


@pytest.mark.rabbit
def test_a_worker_written_from_the_protocol_is_counted(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 4)
    coordinator.wait_for("connected")
    foreign = federation.start(sys.executable, SCRIPT, federation.url, federation.name, "pika")
    coordinator.wait_for("asking pika for the first weights")
    ours = federation.worker("shard:0/3")
    assert [program.end() for program in (coordinator, ours, foreign)] == [0, 0, 0]
    first = load_file(federation.run / "round-0000.safetensors")
    np.testing.assert_array_equal(first["slopes"], np.zeros(3))
    lines = list(map(json.loads, (federation.run / "history.jsonl").read_text().splitlines()))
    committed = [line for line in lines if line["event"] == "committed"]
    assert len(committed) == 4
    for line in committed:
        counted = {one["worker"]: one["num_examples"] for one in line["participants"]}
        assert counted == {"pika": 50, "shard-0-3": 90}
        assert line["rejected"] == 0
    evaluated = [line for line in lines if line["event"] == "evaluated"]
    assert evaluated[-1]["evaluators"] == ["pika", "shard-0-3"]
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]


def test_it_is_short() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) < 64
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported <= {"sys", "time", "msgpack", "numpy", "pika"}


def test_the_bytes_in_the_protocol_are_what_they_are_said_to_be() -> None:
    """The example of docs/protocol.md, by msgpack alone and by fluffle."""
    example = (ROOT / "docs/protocol.md").read_text().partition("### Example")[2]
    _, hexadecimal, _, meaning, _ = example.split("```", 4)
    body = bytes.fromhex(hexadecimal)
    header, payload = msgpack.unpackb(body)
    assert [header, payload] == eval(meaning.removeprefix("python\n"))
    message, view = decode(body)
    assert isinstance(message, Update)
    (delta,) = read_tensors(message.tensors, view).values()
    np.testing.assert_array_equal(delta, np.array([0.5, -1.0], np.float32))
