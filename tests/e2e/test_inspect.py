"""The commands ``queues``, ``peek``, ``tap`` and ``rejected`` with real federations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pika
import pytest
from pika.exceptions import NackError
from safetensors.numpy import load_file

from fluffle_broker.inspect.peek import peek
from fluffle_broker.inspect.queues import read_overview
from fluffle_broker.inspect.rejected import list_rejected
from fluffle_broker.node import node
from fluffle_common.errors import UsageError
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import encode, lay_out
from fluffle_common.transport.open_once import open_once
from fluffle_common.transport.rabbitmq.management import Management
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from tests import here
from tests.e2e.programs import FLUFFLE, ROOT, Federation, Program
from tests.faults import harness
from tests.faults.checker import check

pytestmark = pytest.mark.rabbit
WAITING = f"{ROOT / 'tests/e2e/waiting_task.py'}:task"


@pytest.fixture
def channel(federation: Federation) -> Iterator[Any]:
    connection = pika.BlockingConnection(pika.URLParameters(federation.url))
    opened = connection.channel()
    opened.confirm_delivery()
    yield opened
    connection.close()


@pytest.fixture
def where(
    federation: Federation, broker_node: node.NodeInfo, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """Return the options of a command that inspects the federation."""
    # Not every command has the option --management.
    monkeypatch.setenv("FLUFFLE_MANAGEMENT_URL", broker_node.management_url)
    return ("--federation", federation.name, "--url", federation.url)


@pytest.fixture
def start(federation: Federation, where: tuple[str, ...]) -> Callable[..., Program]:
    """Return a function that starts an inspection command."""
    return lambda *words: federation.start(FLUFFLE, *words, *where)


@pytest.fixture
def ask(where: tuple[str, ...]) -> Callable[..., tuple[int, list[str]]]:
    """Return a function that runs an inspection command; that returns exit code and lines."""

    def run(*words: object) -> tuple[int, list[str]]:
        code, told, errors = here.fluffle(*words, *where)
        return code, [*told.splitlines(), *errors.splitlines()]

    return run


@pytest.fixture
def told(where: tuple[str, ...]) -> Callable[..., Any]:
    """Return a function that runs an inspection command and decodes its JSON."""

    def run(*words: object) -> Any:
        code, told, errors = here.fluffle(*words, "--json", *where)
        assert code == 0, errors
        return json.loads(told)

    return run


def declare(federation: Federation, *workers: str) -> Topology:
    """Declare the federation's queues without a coordinator or workers."""
    topology = Topology(federation.name)

    async def once() -> None:
        async with open_once(AmqpTransport(federation.url, "test")) as link:
            await link.declare(topology.shared())
            for worker in workers:
                await link.declare(topology.of_worker(worker))

    asyncio.run(once())
    return topology


def update(federation: str, number: int, worker: str = "w1") -> bytes:
    table, pieces = lay_out({"kernel": np.full((2, 3), number, np.float32)})
    message = Update(
        federation=federation, run="r", round=number, base="b", worker=worker, num_examples=10,
        seconds=0.5, tensors=table, metrics={"loss": 0.25},
    )  # fmt: skip
    return encode(message, pieces)


def drain(channel: Any, queue: str) -> list[bytes]:
    found = []
    while True:
        method, _, body = channel.basic_get(queue, auto_ack=True)
        if method is None:
            return found
        found.append(body)


# --- peek ----------------------------------------------------------------------------------------


def test_peek_shows_messages_and_changes_nothing(federation, channel, told):
    topology = declare(federation, "w1")
    queues = [topology.updates, topology.rejected, topology.unrouted, topology.inbox("w1")]
    bodies = [*(update(federation.name, number) for number in range(1, 5)), b"junk"]
    for queue in queues:
        for body in bodies:
            channel.basic_publish("", queue, body)
    for queue in queues:
        first = told("peek", queue, "-n", 3)
        again = told("peek", queue.removeprefix(f"{federation.name}."), "-n", 50)
        assert [message["round"] for message in first] == [1, 2, 3]
        assert [message["redelivered"] for message in again] == [True] * 3 + [False] * 2
        assert again[1]["tensors"][0]["mean"] == 2.0
        assert "msgpack" in again[4]["wrong"]
        assert again[4]["first_bytes"] == b"junk".hex(" ")
        assert channel.queue_declare(queue, passive=True).method.message_count == len(bodies)
        assert drain(channel, queue) == bodies


def test_peek_refuses_queues_where_it_would_have_side_effects(federation, channel, ask):
    federation.coordinator("--quorum", 3).wait_for("connected")
    federation.worker("shard:0/3").wait_for("joined run")
    for queue, why in (
        ("inbox.shard-0-3", "being read by worker shard-0-3"),
        ("presence", "being read by the coordinator"),
        ("outbox.shard-0-3", "cannot peek"),
        ("inbox.nobody", "has not connected"),
        ("nonsense", "cannot peek at 'nonsense'"),
    ):
        code, (line,) = ask("peek", queue)
        assert code == 2
        assert why in line


def test_peek_reports_updates_that_it_cannot_see(federation, ask, tmp_path):
    """Nobody else can see an update that the coordinator holds until its commit."""
    waiting = {"WAIT_FOR": str(tmp_path / "go")}
    federation.coordinator("--quorum", 2).wait_for("connected")
    federation.worker("shard:0/3", task=WAITING, env=waiting).wait_for("joined run")
    federation.worker("shard:1/3").wait_for("joined run")

    def held() -> str | None:
        code, lines = ask("peek", "updates")
        assert code == 0
        return next((line for line in lines if "until its commit" in line), None)

    # RabbitMQ's statistics lag behind.
    line = harness.wait_until(held, "what the coordinator holds is told")
    assert "the coordinator holds 1 more message until its commit" in line
    assert "fluffle journal" in line


def test_peeking_at_the_journal_leaves_no_consumer_behind(federation, told):
    coordinator = federation.coordinator("--quorum", 2)
    coordinator.wait_for("connected")

    def peeked() -> list[str] | None:
        names = [message["event"] for message in told("peek", "journal")]
        return names if "connected" in names else None

    events = harness.wait_until(peeked, "the journal has what the coordinator says")
    coordinator.send(signal.SIGINT)
    assert coordinator.end() == 130

    def figures() -> dict[str, Any] | None:
        """Return RabbitMQ's figures of the journal once they are newer than the peek."""
        found = {queue["name"]: queue for queue in told("queues")}[f"{federation.name}.journal"]
        return found if found["ready"] > len(events) else None

    assert harness.wait_until(figures, "RabbitMQ's statistics are there")["consumers"] == 0


# --- peeks on every queue -----------------------------------------------------------------------

WORKERS, ROUNDS, PEEKS = 3, 6, 20


async def look_while(
    program: harness.Program, federation: harness.Federation, hold: Path
) -> Counter[str]:
    """Peek at every queue until a run ends; return how often each was read.

    The run is held in its first round for half of the peeks, and in its middle for the others.
    """
    url, topology = federation.url, Topology(federation.name)
    looked: Counter[str] = Counter()
    names = ["updates", "presence", "rejected", "unrouted", "journal"]
    names += [f"{kind}.w{number}" for kind in ("inbox", "outbox") for number in range(WORKERS)]

    async def look_at(name: str) -> None:
        async with open_once(AmqpTransport(url, "test")) as link:
            try:
                peeked = await peek(link, topology, name, 3)
                assert len(peeked.messages) <= 3
            except UsageError as refused:
                assert re.search("being read|does not exist|cannot peek", str(refused))
            looked[name] += 1

    def conduct() -> None:
        for peeks, then_committed in ((PEEKS // 2, ROUNDS // 2), (PEEKS, 0)):
            hold.touch()
            wanted = partial(lambda least: min(looked[name] for name in names) >= least, peeks)
            harness.wait_until(wanted, "every queue is looked at", timeout_s=120)
            hold.unlink()
            federation.wait_committed(then_committed)

    conducting = asyncio.create_task(asyncio.to_thread(conduct))
    while program.alive():
        await asyncio.gather(*map(look_at, names))
    await conducting
    return looked


def whole_run(federation: harness.Federation, hold: Path) -> harness.Program:
    coordinator = federation.coordinator(
        "--quorum", WORKERS, "--min-workers", WORKERS, "--rounds", ROUNDS,
        "--config", "train_s=0.2",
    )  # fmt: skip
    for number in range(WORKERS):
        federation.worker(number, WORKERS, "--heartbeat", 0.5, FAULTS_HOLD=str(hold))
    return coordinator


def test_twenty_peeks_on_every_queue_change_nothing(broker_node: node.NodeInfo, tmp_path: Path):
    weights, hold = [], tmp_path / "hold"
    for name in ("undisturbed", "looked-at"):
        ports, url = broker_node.ports, broker_node.url
        with harness.Federation(tmp_path / name, url, ports.management) as federation:
            coordinator = whole_run(federation, hold)
            if name == "looked-at":
                looked = asyncio.run(look_while(coordinator, federation, hold))
                assert min(looked.values()) >= PEEKS, looked
                assert len(looked) == 5 + 2 * WORKERS
            assert [program.end() for program in federation.programs] == [0] * (1 + WORKERS)
            federation.gather()
            federation.gather_orphans()
            verdict = check(federation.folder)
            assert verdict.clean, verdict.text()
            assert not (federation.folder / "evidence/rejected.jsonl").exists()
            for line in federation.history("committed"):
                assert len(line["participants"]) == WORKERS
                assert (line["late"], line["rejected"]) == (0, 0)
            weights.append(load_file(federation.run / f"round-{ROUNDS:04d}.safetensors"))
    undisturbed, looked_at = weights
    assert undisturbed.keys() == looked_at.keys()
    for tensor, expected in undisturbed.items():
        np.testing.assert_array_equal(looked_at[tensor], expected)


# --- tap -----------------------------------------------------------------------------------------


def tapped(federation: Federation, broker: node.NodeInfo) -> set[str]:
    """Return the workers whose messages a tap copies."""
    path = f"/api/exchanges/%2F/{federation.name}.work/bindings/source"
    bindings = Management(broker.url, broker.management_url).ask(path)
    return {one["routing_key"] for one in bindings if ".tap." in one["destination"]}


def test_tap_follows_a_run_and_saves_the_messages(federation, start, tmp_path, broker_node):
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 2)
    coordinator.wait_for("connected")
    kept = tmp_path / "kept"
    tap = start("tap", "--json", "--save", kept)
    tap.wait_for("following federation")
    gate = tmp_path / "gate"
    workers = [
        federation.worker(f"shard:{number}/2", task=WAITING, env={"WAIT_FOR": str(gate)})
        for number in (0, 1)
    ]
    both = {"shard-0-2", "shard-1-2"}
    harness.wait_until(lambda: tapped(federation, broker_node) == both, "the tap has both")
    gate.touch()
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]
    tap.wait_for('"kind": "bye"')
    tap.send(signal.SIGINT)
    assert tap.end() == 130
    told = [json.loads(line) for line in tap.lines if line.startswith("{")]
    updates = [(one["workers"], one["round"]) for one in told if one["kind"] == "update"]
    assert sorted(updates) == [([f"shard-{n}-2"], round_) for n in (0, 1) for round_ in (1, 2)]
    fits = [one for one in told if one["kind"] == "fit" and one["round"] == 2]
    assert {worker for fit in fits for worker in fit["workers"]} == both
    assert {one["direction"] for one in fits} == {"to"}
    assert "heartbeat" not in {one["kind"] for one in told}
    assert len(list(kept.glob("*.msgpack"))) == len(list(kept.glob("*.json"))) == len(told)
    (saved,) = kept.glob("*-update-shard-0-2-round-2.json")
    assert json.loads(saved.read_text())["tensors"]


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_tap_stops_after_the_given_number_of_lines(
    federation, start, channel, broker_node, queue_type
):
    topology = declare(federation, "w1")
    tap = start("tap", "--kind", "update", "--worker", "w1", "-n", 2, "--queue-type", queue_type)
    tap.wait_for("following federation")
    api = Management(broker_node.url, broker_node.management_url)
    (own,) = harness.wait_until(lambda: api.queues(rf"^{federation.name}\.tap\."), "it is listed")
    assert own["type"] == queue_type
    for number, worker in ((1, "w1"), (1, "w2"), (2, "w1"), (3, "w1")):
        body = update(federation.name, number, worker)
        # RabbitMQ 4.3 refuses it while it deletes the queue of the tap; the other queue has it.
        with contextlib.suppress(NackError):
            channel.basic_publish(topology.results, f"update.{worker}", body)
    assert tap.end() == 0
    first, second = tap.lines[1:]
    assert re.search(r"← w1 +update +round 1, 10 examples, loss 0.25  \(\d+ B\)", first)
    assert "round 2" in second
    assert len(drain(channel, topology.updates)) == 4


# --- rejected ------------------------------------------------------------------------------------


def test_rejected_lists_shows_requeues_and_purges(federation, channel, told, ask):
    topology = Topology(federation.name)
    coordinator = federation.coordinator("--quorum", 2)
    coordinator.wait_for("connected")
    channel.basic_publish("", topology.updates, b"junk")
    channel.basic_publish(topology.results, "update.w1", update(federation.name, 3))
    for _ in range(2):
        coordinator.wait_for("rejected a message")

    def both() -> list[dict[str, Any]] | None:
        listed: list[dict[str, Any]] = told("rejected")["messages"]
        return listed if len(listed) == 2 else None

    # The coordinator logs a rejection before the message is in the queue.
    junk, other = harness.wait_until(both, "both are rejected")
    assert (junk["cause"], junk["from"]) == ("malformed", topology.updates)
    assert (other["cause"], other["worker"], other["round"]) == ("run", "w1", 3)
    shown = told("rejected", "show", 2)
    assert shown["tensors"][0]["max"] == 3.0
    assert shown["reason"] == other["reason"]

    (sent,) = told("rejected", "requeue", 2)
    assert (sent["exchange"], sent["key"]) == (topology.results, "update.w1")
    coordinator.wait_for("rejected a message of w1: the message belongs to run r")  # still invalid
    harness.wait_until(both, "it is rejected again")
    code, lines = ask("rejected", "purge", "--yes")
    assert code == 0
    assert "2 deleted" in lines
    assert told("rejected")["messages"] == []


def test_rejected_reports_dropped_messages(federation, channel, told, ask):
    topology = declare(federation)
    for number in range(1200):
        channel.basic_publish("", topology.rejected, b"%d" % number)

    def known() -> dict[str, Any] | None:
        answer: dict[str, Any] = told("rejected")
        # The broker may count the messages of the queue before all that were published.
        return answer if (answer["dropped"] or 0) >= 200 else None

    answer = harness.wait_until(known, "RabbitMQ's statistics are there")
    assert (answer["kept"], answer["dropped"]) == (1000, 200)
    assert answer["messages"][0]["first_bytes"] == b"200".hex(" ")
    code, lines = ask("rejected", "-n", 1)
    assert code == 0
    assert "1,000 of 1,200 messages are kept; the queue's limit" in lines[0]


def test_listing_again_at_once_finds_every_rejected_message(federation, channel):
    topology = declare(federation)
    for number in range(1000):
        channel.basic_publish("", topology.rejected, b"%d" % number)

    async def listed() -> int:
        async with open_once(AmqpTransport(federation.url, "test")) as link:
            return len(await list_rejected(link, topology))

    harness.wait_until(lambda: asyncio.run(listed()) == 1000, "all are in the queue")
    assert [asyncio.run(listed()) for _ in range(20)] == [1000] * 20


# --- queues --------------------------------------------------------------------------------------


def test_queues_shows_a_worker_that_died(federation, told):
    federation.coordinator("--quorum", 2).wait_for("connected")
    worker = federation.worker("shard:0/2")
    worker.wait_for("joined run")
    inbox = f"{federation.name}.inbox.shard-0-2"

    def hint() -> str | None:
        return {queue["name"]: queue["hint"] for queue in told("queues")}.get(inbox)

    worker.process.kill()
    told_of = harness.wait_until(hint, "RabbitMQ's statistics are there")
    assert told_of.startswith("worker shard-0-2 is not connected")


def test_queues_shows_the_rate_of_a_message_a_second_each_time(federation, channel, broker_node):
    topology = declare(federation)
    api = Management(broker_node.url, broker_node.management_url)
    rates = [0.0]

    def four_in_a_row() -> bool:
        channel.basic_publish("", topology.unrouted, b"")
        figures = read_overview(api, topology).queues
        (queue,) = (one for one in figures if one.name == topology.unrouted)
        rates.append(min(queue.in_rate or 0.0, queue.growth_rate or 0.0))
        return all(rates[-4:])

    harness.wait_until(four_in_a_row, "the rate is shown each time", look_s=1.0)


def test_queues_watch_ends_with_ctrl_c(federation, start):
    declare(federation)
    program = start("queues", "--watch")
    for _ in range(2):
        program.wait_for("updates")
    program.wait_for("nobody is connected|no coordinator is connected")
    program.send(signal.SIGINT)
    assert program.end() == 130
    assert "Traceback" not in "\n".join(program.lines)
