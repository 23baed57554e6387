"""Malformed messages: each ends in the rejected queue with its reason, the run goes on."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pika
import pytest

from tests.e2e.programs import ROOT, Federation

pytestmark = pytest.mark.rabbit
WAITING = f"{ROOT / 'tests/e2e/waiting_task.py'}:task"


def hostile(federation: str, run: str, base: str) -> dict[str, tuple[bytes, str]]:
    """Return a dozen bodies in a genuine worker's name, each with a word of why it is rejected."""
    slopes, intercept = np.zeros(3), np.zeros(())

    def body(payload: bytes | None = None, **changes: object) -> bytes:
        tensors = [
            {"name": "slopes", "dtype": "float64", "shape": [3], "offset": 0, "nbytes": 24},
            {"name": "intercept", "dtype": "float64", "shape": [], "offset": 64, "nbytes": 8},
        ]
        header = {
            "protocol": 2, "federation": federation, "kind": "update", "run": run, "round": 1,
            "base": base, "worker": "shard-0-2", "num_examples": 5, "seconds": 0.1, "metrics": {},
            "tensors": tensors, **changes,
        }  # fmt: skip
        plain = slopes.tobytes() + bytes(40) + intercept.tobytes()
        return msgpack.packb([header, plain if payload is None else payload])

    def table(**change: object) -> list[dict]:
        first = {"name": "slopes", "dtype": "float64", "shape": [3], "offset": 0, "nbytes": 24}
        second = {"name": "intercept", "dtype": "float64", "shape": [], "offset": 64, "nbytes": 8}
        return [{**first, **change}, second]

    nan = np.full(3, np.nan).tobytes() + bytes(48)
    claims = table(shape=[25_000_000], nbytes=200_000_000)
    return {
        "random bytes": (np.random.default_rng(0).bytes(500), "msgpack"),
        "truncated": (body()[:-10], "payload"),
        "wrong run": (body(run="other"), "run other"),
        "wrong base": (
            body(base="other"),
            f"the update was trained from the weights other; round 1 began with {base}",
        ),
        "no base": (body(base=None), "base"),
        "wrong shape": (body(tensors=table(shape=[1, 3])), "shape"),
        "unknown dtype": (body(tensors=table(dtype="complex64")), "dtype"),
        "NaN": (body(nan), "NaN"),
        "n = 0": (body(num_examples=0), "num_examples"),
        "n = -1": (body(num_examples=-1), "num_examples"),
        "n = 10^18": (body(num_examples=10**18), "num_examples"),
        "200 MB claimed": (body(tensors=claims), "200000000"),
    }


@pytest.fixture
def connection(federation: Federation) -> Iterator[pika.BlockingConnection]:
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(federation.url))) as opened:
        yield opened


def test_what_is_rejected_can_be_looked_at(
    federation: Federation, connection: pika.BlockingConnection
) -> None:
    coordinator = federation.coordinator("--min-workers", 1, "--quorum", 2)
    federation.worker("shard:0/2")
    coordinator.wait_for("round 1: opened")
    run = json.loads((federation.run / "run.json").read_text())["run"]
    body, _ = hostile(federation.name, run, federation.base(1))["NaN"]
    channel = connection.channel()
    channel.basic_publish(
        "", f"{federation.name}.updates", body.replace(b"shard-0-2", b"mallory-2")
    )
    coordinator.wait_for("rejected a message")
    for _, _, rejected in channel.consume(f"{federation.name}.rejected", inactivity_timeout=60):
        assert rejected == body.replace(b"shard-0-2", b"mallory-2")
        break


def test_a_dozen_kinds_of_malformed_updates(
    federation: Federation, connection: pika.BlockingConnection, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 3)
    workers = [
        federation.worker(f"shard:{n}/2", task=WAITING, env={"WAIT_FOR": str(gate)}) for n in (0, 1)
    ]
    coordinator.wait_for("round 1: opened")
    run = json.loads((federation.run / "run.json").read_text())["run"]
    bodies = hostile(federation.name, run, federation.base(1))
    channel = connection.channel()
    channel.confirm_delivery()
    for what, (body, _) in bodies.items():
        named = pika.BasicProperties(message_id=what)
        channel.basic_publish("", f"{federation.name}.updates", body, named)
    for _ in bodies:
        coordinator.wait_for("rejected a message")
    gate.touch()
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]

    reasons, causes = {}, {}
    while True:
        method, properties, _ = channel.basic_get(f"{federation.name}.rejected", auto_ack=True)
        if method is None:
            break
        what = properties.message_id
        assert what not in reasons
        reasons[what] = properties.headers["reason"]
        causes[what] = properties.headers["cause"]
    assert reasons.keys() == bodies.keys()
    for what, (_, word) in bodies.items():
        assert word in reasons[what], (what, reasons[what])
    assert (causes["wrong base"], causes["no base"]) == ("round", "malformed")
    committed = [
        line
        for line in map(json.loads, (federation.run / "history.jsonl").read_text().splitlines())
        if line["event"] == "committed"
    ]
    assert sum(line["rejected"] for line in committed) == len(bodies)
    assert len(committed) == 3
    for line in committed:
        assert {p["worker"] for p in line["participants"]} == {"shard-0-2", "shard-1-2"}


def test_what_comes_in_anothers_name_is_rejected_where_users_are_verified(
    federation: Federation, connection: pika.BlockingConnection
) -> None:
    coordinator = federation.coordinator("--quorum", 1, "--rounds", 1, "--verify-users")
    coordinator.wait_for("connected")
    federation.worker("shard:0/2").wait_for("connected")
    coordinator.wait_for("rejected a message: the message names shard-0-2 as its sender, but")
    rejected, headers = f"{federation.name}.rejected", None
    while headers is None:
        _, properties, _ = connection.channel().basic_get(rejected, auto_ack=True)
        headers = properties and properties.headers
    assert headers["cause"] == "sender"
    assert (headers["worker"], coordinator.process.poll()) == ("shard-0-2", None)


def test_a_new_process_takes_no_mail_of_an_earlier_one_and_rejects_what_is_wrong_with_it(
    federation: Federation, connection: pika.BlockingConnection
) -> None:
    first = federation.worker("shard:0/2", "--wait-id", 60)
    first.wait_for("connected")
    first.send(signal.SIGKILL)
    first.end()
    stop = {"protocol": 2, "federation": federation.name, "kind": "stop", "run": "an earlier one",
            "round": 9, "reason": "it is over"}  # fmt: skip
    bodies = [msgpack.packb([stop, b""]), msgpack.packb([{**stop, "kind": "dance"}, b""])]
    for body in bodies:
        connection.channel().basic_publish("", f"{federation.name}.inbox.shard-0-2", body)
    coordinator = federation.coordinator("--quorum", 1, "--rounds", 1)
    coordinator.wait_for("connected")
    second = federation.worker("shard:0/2", "--wait-id", 60)
    second.wait_for("rejected a message: ")
    assert [program.end() for program in (coordinator, second)] == [0, 0]
    assert any("joined run" in line for line in second.lines)
    _, _, kept = connection.channel().basic_get(f"{federation.name}.rejected", auto_ack=True)
    assert kept == bodies[1]
