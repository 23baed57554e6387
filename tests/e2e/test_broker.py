"""The command ``fluffle broker`` with real nodes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fluffle_broker.node import network, node, packages, processes, record
from fluffle_broker.node.record import NodeInfo, Ports
from fluffle_common.errors import BrokerError
from tests.e2e.manage import manage
from tests.shared import shared_node

pytestmark = [
    pytest.mark.rabbit,
    pytest.mark.skipif(
        not (packages.find_installed() or packages.find_unpacked() or shutil.which("apt-get")),
        reason="no RabbitMQ here, and no apt to get one",
    ),
]

_FREE = Ports(0, 0, 0)
_DURABLE = {"durable": True, "arguments": {}}


def fluffle(*arguments: str | Path, state: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments, state=state), capture_output=True, text=True, check=False
    )


def _command(*arguments: str | Path, state: Path) -> list[str]:
    start = "from fluffle_common.cli.app import main; main()"
    return [sys.executable, "-c", start, *map(str, arguments), "--state", str(state)]


def ours(state: Path) -> list[str]:
    """Return the running processes of a state folder's node, epmd included."""
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("HOME", "")
            if home.startswith(str(state)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_gone(state: Path) -> None:
    """Check that nothing is left of a VM that exited; its helpers need a moment to notice."""
    processes.wait_until(lambda: not ours(state), timeout_s=60)
    assert ours(state) == []


@contextlib.contextmanager
def stopped_at_the_end(parent: Path) -> Iterator[Path]:
    """Yield a state folder with a difficult path; stop the node in it at the end."""
    folder = parent / "a state, größer"
    yield folder
    node.down(folder, grace_s=0)
    assert_gone(folder)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    with stopped_at_the_end(tmp_path) as folder:
        yield folder


@dataclass(frozen=True)
class Running:
    """A node that no test stops."""

    state: Path
    info: NodeInfo


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Run one node with another configuration and a known cookie."""
    conf = "consumer_timeout = 10000"
    with shared_node(tmp_path_factory, "running", extra_conf=conf, cookie="shared") as info:
        yield Running(info.folder.parent, info)


@pytest.fixture
def start(state: Path) -> Callable[..., NodeInfo]:
    return lambda **options: node.up(state, **{"ports": _FREE, **options})


def test_up_status_down(state: Path) -> None:
    # capture_output waits for both pipes to close, so the node must not keep them open.
    up = fluffle("broker", "up", "--port", "0", state=state)
    assert up.returncode == 0, up.stderr
    info = node.running_node(state)
    assert info is not None
    assert json.loads((state / "broker/node.json").read_text())["url"] == info.url
    assert info.url.replace("guest:guest@", "") in up.stdout
    assert "@" not in up.stdout
    assert info.management_url in up.stdout
    assert str(info.logs) in up.stdout
    assert manage(info, "GET", "overview")["rabbitmq_version"] == info.version

    again = fluffle("broker", "up", state=state)
    assert again.returncode == 0
    assert "is already up" in again.stdout
    assert node.running_node(state) == info

    shown = json.loads(fluffle("broker", "status", "--json", state=state).stdout)
    url = info.url.replace("guest:guest@", "")
    assert (shown["running"], shown["url"], shown["pid"]) == (True, url, info.pid)

    down = fluffle("broker", "down", state=state)
    assert (down.returncode, down.stdout) == (0, "RabbitMQ is stopped\n")
    assert ours(state) == []
    assert not (state / "broker/node.json").exists()
    assert network.epmd_nodes(info.ports.epmd) is None

    gone = fluffle("broker", "status", "--json", state=state)
    assert (gone.returncode, json.loads(gone.stdout)) == (3, {"running": False})
    assert fluffle("broker", "down", state=state).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="tells sockets by /proc")
def test_nothing_listens_beyond_the_loopback_interface(running: Running) -> None:
    info = running.info
    listening = {
        socket.laddr
        for process in psutil.process_iter()
        if process.pid == info.pid or (process.name() == "epmd" and _serves(process, running.state))
        for socket in process.net_connections(kind="inet")
        if socket.status == psutil.CONN_LISTEN
    }
    asked = {info.ports.amqp, info.ports.management, info.ports.prometheus, info.ports.epmd}
    assert {each.port for each in listening} == asked | {info.ports.distribution}
    assert {each.ip for each in listening} <= {"127.0.0.1", "::1"}


def _serves(process: psutil.Process, state: Path) -> bool:
    try:
        return str(process.environ().get("HOME", "")).startswith(str(state))
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie, or another user's epmd
        return False


def test_the_next_up_completes_one_that_was_killed_and_restarts_a_node_that_was(
    running: Running, state: Path
) -> None:
    with subprocess.Popen(
        _command("broker", "up", "--port", "0", state=state),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as up:
        folder = record.broker_folder(state)
        assert processes.wait_until(lambda: record.load(folder) is not None, timeout_s=120)
        up.kill()
        up.communicate()
    begun = record.load(folder)
    assert begun is not None
    info = node.up(state)
    assert (info.pid, info.ports) == (begun.pid, begun.ports)
    assert info.version
    # The two nodes that run now have nothing in common.
    assert not set(vars(running.info.ports).values()) & set(vars(info.ports).values())

    assert info.pid is not None
    manage(info, "PUT", "queues/%2F/kept", _DURABLE)
    manage(
        info,
        "POST",
        "exchanges/%2F/amq.default/publish",
        {
            "routing_key": "kept",
            "payload": "weights",
            "payload_encoding": "string",
            "properties": {"delivery_mode": 2},
        },
    )
    # The API has answered, so the message is on disk. Mnesia writes the queue itself to disk a
    # little later, unless it is told to.
    subprocess.run(
        [info.folder / "rabbitmqctl", "eval", "mnesia:sync_log()."], capture_output=True, check=True
    )
    os.kill(info.pid, signal.SIGKILL)
    said: list[str] = []
    back = node.up(state, ports=info.ports, report=said.append)
    assert any("cleaning up after it" in line for line in said)
    assert (back.ports, back.url) == (info.ports, info.url)
    assert back.pid != info.pid
    (message,) = manage(
        back,
        "POST",
        "queues/%2F/kept/get",
        {"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto"},
    )
    assert message["payload"] == "weights"
    assert node.down(state, grace_s=0)
    assert node.running_node(running.state) == running.info


def test_extra_configuration_and_cookie_override_the_defaults(running: Running) -> None:
    ask = "{ok, V} = application:get_env(rabbit, consumer_timeout), {V, erlang:get_cookie()}."
    told = subprocess.run(
        [running.info.folder / "rabbitmqctl", "eval", ask],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "{10000,shared}"


def test_the_epmd_of_a_cluster_runs_until_the_last_node_stops(
    running: Running, tmp_path: Path
) -> None:
    shared = Ports(0, 0, 0, epmd=running.info.ports.epmd)
    other = tmp_path / "other"
    try:
        node.up(other, ports=shared, node_name="other")
        assert sorted(network.epmd_nodes(shared.epmd) or ()) == ["fluffle", "other"]
    finally:
        node.down(other, grace_s=0)
    assert network.epmd_nodes(shared.epmd) == ["fluffle"]


def test_a_failed_boot_is_one_line_and_leaves_nothing_behind(
    state: Path, start: Callable[..., NodeInfo]
) -> None:
    with pytest.raises(BrokerError, match="unknown variable: no_such_key") as failed:
        start(extra_conf="no_such_key = 1")
    assert "\n" not in str(failed.value)
    assert "startup.log" in str(failed.value)
    assert_gone(state)
    assert record.load(record.broker_folder(state)) is None


def test_a_taken_port_is_one_line_and_exit_code_3(running: Running, tmp_path: Path) -> None:
    port = running.info.ports.amqp
    refused = fluffle("broker", "up", "--port", str(port), state=tmp_path / "other")
    assert refused.returncode == 3
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert f"port {port} cannot be used" in line


@pytest.mark.parametrize("moment", ["launched", "epmd answers"])
def test_ctrl_c_during_the_start_leaves_nothing_behind(state: Path, moment: str) -> None:
    with subprocess.Popen(
        _command("broker", "up", "--port", "0", state=state),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as up:

        def reached() -> bool:
            begun = record.load(record.broker_folder(state))
            if begun is None:
                return False
            return moment == "launched" or bool(network.epmd_nodes(begun.ports.epmd))

        assert processes.wait_until(reached, timeout_s=120)
        os.killpg(up.pid, signal.SIGINT)
        up.communicate()
    assert up.returncode == 130
    assert ours(state) == []
    assert record.load(record.broker_folder(state)) is None
