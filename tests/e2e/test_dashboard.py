"""The live page in a real browser, beside real processes and a real RabbitMQ."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pika
import pytest
from playwright.sync_api import Browser

from fluffle_broker.node.network import free_ports
from fluffle_broker.node.node import NodeInfo
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.transfer_parts import pack
from fluffle_common.transport.rabbitmq.management import Management
from tests.browser import chromium, window
from tests.e2e.programs import FLUFFLE, ROOT, Federation, Program
from tests.faults.harness import wait_until
from tests.faults.proxy import Proxy

pytestmark = pytest.mark.rabbit

# What the browser says of a server that has ended, depending on what it was doing.
GONE = re.compile("net::ERR_(CONNECTION_(REFUSED|RESET|CLOSED)|EMPTY_RESPONSE|INCOMPLETE_CHUNKED)")
WAITING = f"{ROOT / 'tests/e2e/waiting_task.py'}:task"
NAN = "tensor 'slopes' has 3 values that are NaN or infinite"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


def page_of(program: Program) -> str:
    return program.wait_for("the page is at").split()[-1]


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


def publish_nan(federation: Federation, worker: str, number: int) -> None:
    """Send an update with NaN in it, in the name of a worker that is there."""
    run = json.loads((federation.run / "run.json").read_text())["run"]
    update = Update(
        federation=federation.name,
        run=run,
        round=number,
        base=federation.base(number),
        worker=worker,
        num_examples=5,
        seconds=0.1,
    )
    _, body, _ = pack(update, {"slopes": np.full(3, np.nan), "intercept": np.zeros(())})
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(federation.url))) as opened:
        opened.channel().basic_publish("", f"{federation.name}.updates", bytes(body))


def json_output(federation: Federation, command: str, *flags: str) -> str:
    """Return what a command prints as JSON."""
    where = ("--federation", federation.name, "--url", federation.url, "--json")
    program = federation.start(FLUFFLE, command, *where, *flags)
    assert program.end() == 0
    return "\n".join(program.lines)


def unacknowledged(federation: Federation, broker: NodeInfo) -> int:
    """Return how many updates the coordinator holds."""
    path = "/api/queues?disable_stats=true&enable_queue_totals=true"  # the others are 5 s old
    queues = Management(broker.url, broker.management_url).ask(path)
    (found,) = [one for one in queues if one["name"] == f"{federation.name}.updates"]
    return int(found["messages_unacknowledged"])


def committed(federation: Federation) -> list[int]:
    lines = (federation.run / "history.jsonl").read_text().splitlines()
    return [line["round"] for line in map(json.loads, lines) if line["event"] == "committed"]


def waiting_workers(federation: Federation, gate: Path, *shards: int, until: int) -> list[Program]:
    """Start workers whose trainings, from number ``until`` on, wait for the gate."""
    env = {"WAIT_FOR": str(gate), "WAIT_FROM": str(until)}
    return [federation.worker(f"shard:{n}/3", task=WAITING, env=env) for n in shards]


def test_a_live_run(federation: Federation, browser: Browser, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 4, "--dashboard", "127.0.0.1:0")
    url = page_of(coordinator)
    with window(browser, url) as seen:
        seen.wait("#phase", "waiting for workers: 0 of 2 are connected")
        seen.wait("#link", "live")
        assert seen.wait("h1") == federation.name

        workers = waiting_workers(federation, gate, 0, 1, until=3)
        seen.wait("#phase", "round 3 is open: 0 of 2 updates")
        rounds = seen.page.locator("#history tr th").all_inner_texts()
        assert [int(number) for number in rounds] == [2, 1] == committed(federation)[::-1]
        # The evaluation of round 2 may arrive after the opening of round 3.
        seen.page.locator('#chart svg[aria-label*="After round 2"]').wait_for()

        workers += waiting_workers(federation, gate, 2, until=1)
        seen.wait("#workers tr", "shard-2-3")
        seen.wait("#journal li", "shard-2-3 joined")
        seen.wait("#answers li", "shard-2-3")

        publish_nan(federation, "shard-0-3", 3)
        assert NAN in coordinator.wait_for("rejected a message")
        refused = seen.wait("#rejected li", "not_finite")
        assert NAN in refused
        assert "shard-0-3" in refused
        seen.wait("#journal li", f"rejected a message of shard-0-3: {NAN}")
        metrics = read(f"{url}metrics")
        assert 'fluffle_rejected_messages_total{cause="not_finite"} 1.0' in metrics
        assert "fluffle_rounds_committed_total 2.0" in metrics
        # The page is told before the broker is.
        line = wait_until(
            lambda: json_output(federation, "journal", "--kind", "rejected"), "it is in the journal"
        )
        fields = json.loads(line)["fields"]
        assert (fields["reason"], fields["cause"]) == (NAN, "not_finite")
        [message] = wait_until(
            lambda: json.loads(json_output(federation, "rejected"))["messages"], "it is rejected"
        )
        assert (message["reason"], message["cause"]) == (NAN, "not_finite")
        assert read(f"{url}readyz").startswith("ready: round 3 is open")

        gate.touch()
        seen.wait("#phase", "finished: 4 rounds are done")
        seen.wait("#link", "the run has ended")
        rounds = seen.page.locator("#history tr th").all_inner_texts()
        assert [int(number) for number in rounds] == [4, 3, 2, 1]
        # That the page cannot be reached any more is no mistake of its own.
        assert [text for text in seen.complaints if not GONE.search(text)] == []
    assert [program.end() for program in (coordinator, *workers)] == [0] * 4


def test_no_complaint_on_a_phone_in_the_dark(
    federation: Federation, browser: Browser, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    url = page_of(federation.coordinator("--quorum", 2, "--dashboard", "127.0.0.1:0"))
    waiting_workers(federation, gate, 0, 1, until=2)
    with window(browser, url, width=360, scheme="dark") as seen:
        seen.wait("#phase", "round 2 is open")
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
        dark = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.page.get_by_role("button", name="light and dark").click()
        light = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.page.reload()
        seen.wait("#phase", "round 2 is open")
        assert (
            seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == light != dark
        )
        assert seen.complaints == []


def test_it_survives_a_restart_of_the_coordinator(
    federation: Federation, browser: Browser, tmp_path: Path
) -> None:
    gate, address = tmp_path / "gate", f"127.0.0.1:{free_ports(1)[0]}"
    flags = ("--quorum", 2, "--rounds", 3, "--dashboard", address)
    coordinator = federation.coordinator(*flags)
    url = page_of(coordinator)
    workers = waiting_workers(federation, gate, 0, 1, until=2)
    with window(browser, url) as seen:
        seen.wait("#phase", "round 2 is open")
        coordinator.send(signal.SIGKILL)
        seen.wait("#link", "connection lost, retrying")
        coordinator = federation.coordinator(*flags)
        seen.wait("#link", "live")
        seen.wait("#phase", "round 2 is open")
        assert seen.page.locator("#history tr th").all_inner_texts() == ["1"]
        gate.touch()
        seen.wait("#phase", "finished: 3 rounds are done")
    assert [program.end() for program in (coordinator, *workers)] == [0] * 3


def test_a_port_in_use_is_said_before_the_run_begins(federation: Federation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        coordinator = federation.coordinator("--dashboard", address)
        assert coordinator.end() == 2
    assert len(coordinator.lines) == 1
    assert re.search(f"cannot listen on {address}.*in use.*--dashboard", coordinator.lines[0])


def test_beside_a_federation(
    broker_node: NodeInfo, federation: Federation, browser: Browser, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with Proxy(broker_node.ports.amqp) as proxy:
        beside = federation.start(
            FLUFFLE, "dashboard", "--federation", federation.name, "--listen", "127.0.0.1:0",
            "--url", f"amqp://guest:guest@127.0.0.1:{proxy.port}/",
            "--management", broker_node.management_url,
        )  # fmt: skip
        with window(browser, page_of(beside)) as seen:
            seen.wait("#link", "live")
            flags = ("--quorum", 2, "--rounds", 3)
            coordinator = federation.coordinator(*flags)
            workers = waiting_workers(federation, gate, 0, 1, until=2)
            seen.wait("#phase", "round 2 is open: 0 of 2 updates")
            assert seen.page.locator("#history tr th").all_inner_texts() == ["1"]
            seen.wait("#workers tr", "10/10")  # what no event tells, and a heartbeat does
            seen.wait("#queues tr", "inbox.shard-0-3")

            publish_nan(federation, "shard-0-3", 2)
            assert NAN in seen.wait("#rejected li", "not_finite")
            # Before that, the next coordinator would reject it once more.
            wait_until(lambda: unacknowledged(federation, broker_node) == 0, "it is acknowledged")
            coordinator.send(signal.SIGKILL)
            seen.wait("#phase", "no coordinator is connected")
            proxy.aim(free_ports(1)[0])
            proxy.cut(1.0, random.Random(1))
            seen.wait("#link", "no broker at")
            proxy.aim(broker_node.ports.amqp)
            seen.wait("#link", "live")
            coordinator = federation.coordinator(*flags)
            seen.wait("#journal li", "continuing run")
            gate.touch()
            seen.wait("#phase", "finished: 3 rounds are done")
            rounds = seen.page.locator("#history tr th").all_inner_texts()
            assert [int(number) for number in rounds] == [3, 2, 1]
            assert read(f"{seen.page.url}readyz").startswith("ready: finished")
            metrics = read(f"{seen.page.url}metrics")
            assert "fluffle_rounds_committed_total 3.0" in metrics
            assert 'fluffle_rejected_messages_total{cause="not_finite"} 1.0' in metrics
            assert seen.complaints == []
        assert [program.end() for program in (coordinator, *workers)] == [0] * 3
        beside.send(signal.SIGTERM)
        assert beside.end() == 128 + signal.SIGTERM
    page, missing, *outage, back = beside.lines
    assert page.startswith("the page is at")
    assert "no coordinator has created federation" in missing
    assert any("no broker at" in line for line in outage)
    assert back.startswith("fluffle: connected to the broker")
