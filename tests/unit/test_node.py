"""Starting and stopping a node, as far as it needs no RabbitMQ."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fluffle_broker.cli import broker as cli
from fluffle_broker.node import container, launch, network, node, packages, processes, record
from fluffle_broker.node.packages import Installation
from fluffle_broker.node.record import NodeInfo, Ports
from fluffle_common.errors import BrokerError

_START = b"\x00\x0a\x00\x0a\x00\x09" + b"\x00\x00\x00\x12\x07versionS\x00\x00\x00\x063.10.8"


@pytest.fixture
def info(tmp_path: Path) -> NodeInfo:
    folder = tmp_path / "broker"
    folder.mkdir()
    return NodeInfo(
        url="amqp://guest:guest@127.0.0.1:1/",
        management_url="http://127.0.0.1:2/",
        prometheus_url="http://127.0.0.1:3/metrics",
        node_name="fluffle@localhost",
        ports=Ports(1, 2, 3, 4, 5),
        pid=os.getpid(),
        born=processes.birth(os.getpid()),
        started_as="unpacked",
        version="3.10.8",
        folder=folder,
    )


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that puts a shell script first on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


@contextmanager
def served(reply: bytes) -> Iterator[int]:
    """Answer one connection with fixed bytes and close it; yield the port."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        patch.setattr(network, "_TIMEOUT_S", 60.0)

        def answer() -> None:
            link, _ = server.accept()
            with link:
                link.recv(64)
                link.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


# --- the record -----------------------------------------------------------------------------------


def test_the_record_is_private_and_loads_unchanged(info: NodeInfo) -> None:
    record.save(info)
    assert record.load(info.folder) == info
    assert (info.folder / "node.json").stat().st_mode & 0o777 == 0o600
    assert [each.name for each in info.folder.iterdir()] == ["node.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "[" * 100_000, '{"ports": {"amqp": 1, "gone": 2}}']
)
def test_an_unreadable_record_is_none(info: NodeInfo, text: str) -> None:
    (info.folder / "node.json").write_text(text)
    assert record.load(info.folder) is None


def test_a_reused_pid_is_not_the_node(info: NodeInfo, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = dataclasses.replace(info.ports, amqp=server.getsockname()[1])
        record.save(dataclasses.replace(info, ports=ports))
        assert node.running_node(tmp_path) is not None
        record.save(dataclasses.replace(info, ports=ports, born="another time"))
        assert node.running_node(tmp_path) is None


# --- checks before the start ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "ports", "extra", "message"),
    [
        ("s", Ports(5, 7, 7), "", "port 7 is given twice"),
        ("it's", Ports(0, 0, 0), "", "the path contains '"),
        ("file", Ports(0, 0, 0), "", "cannot use the state folder"),
        ("x" * 300, Ports(0, 0, 0), "", "too long"),
    ],
)
def test_up_refuses(tmp_path: Path, state: str, ports: Ports, extra: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BrokerError, match=message) as refused:
        node.up(tmp_path / state, ports=ports, extra_conf=extra)
    assert "\n" not in str(refused.value)


def test_up_refuses_a_disk_on_which_publishers_would_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "DISK_FREE_LIMIT_BYTES", 1 << 62)
    with pytest.raises(BrokerError, match="MB of free space"):
        node.up(tmp_path, ports=Ports(0, 0, 0))


def test_a_taken_port_is_named_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            BrokerError, match=f"AMQP port {port} cannot be used .* in use"
        ) as refused:
            network.require_free(port, "AMQP", "--port")
        if sys.platform == "linux":
            assert f"(pid {os.getpid()})" in str(refused.value)
    network.require_free(port, "AMQP", "--port")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of a process")
def test_a_port_of_another_folders_broker_is_named_with_its_folder(tmp_path: Path) -> None:
    folder = record.broker_folder(tmp_path)
    folder.mkdir()
    (folder / "node.json").touch()
    code = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    variables = {**os.environ, "RABBITMQ_CONFIG_FILE": str(folder / "etc/rabbitmq.conf")}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        port = int(other.stdout.readline())
        with pytest.raises(BrokerError, match=rf"the fluffle broker of {tmp_path}\);"):
            network.require_free(port, "AMQP", "--port")
        other.stdin.close()


def test_down_without_a_node_creates_no_folder(tmp_path: Path) -> None:
    assert node.down(tmp_path / "none") is False
    assert not (tmp_path / "none").exists()


# --- ports and protocols --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ((None, None, None), Ports(5673, 15673, 15693)),
        ((7, None, None), Ports(7, 15673, 15693)),
        ((0, None, None), Ports(0, 0, 0)),
        ((0, 8, None), Ports(0, 8, 0)),
        ((None, None, 0), Ports(5673, 15673, 0)),
    ],
)
def test_port_0_alone_chooses_all_ports(
    given: tuple[int | None, int | None, int | None], chosen: Ports
) -> None:
    assert cli.chosen_ports(*given) == chosen


def test_free_ports_are_distinct_and_none_that_the_system_hands_out() -> None:
    ports = set(network.free_ports(20))
    assert len(ports) == 20
    assert max(ports) < 32_768  # where Linux begins; macOS and Windows begin at 49152
    with socket.socket() as held:
        held.bind((network.LOOPBACK, min(ports)))
        assert min(ports) not in network.free_ports(1)


def test_a_port_that_was_given_is_not_chosen_again(monkeypatch) -> None:
    monkeypatch.setattr(network, "free_ports", lambda count: list(range(40000, 40000 + count)))
    ports = node._with_free_ports(Ports(40000, 40001, 0, 0, 0))
    assert len(set(dataclasses.astuple(ports))) == 5
    assert (ports.amqp, ports.management) == (40000, 40001)


@pytest.mark.parametrize(
    ("reply", "version"),
    [
        (b"\x01\x00\x00" + len(_START).to_bytes(4) + _START + b"\xce", "3.10.8"),
        (b"\x01\x00\x00\x00\x00\x00\x06\x00\x0a\x00\x0a\x00\x09\xce", ""),
        (b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x32\xce", None),
        (b"\x01\x00\x00\x00\x00\x00\x00\xce", None),
        (b"\x01\x00\x00\x00\x00\x01\x00cut off", None),
        (b"AMQP\x00\x00\x09\x01", None),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", None),
        (b"", None),
    ],
)
def test_only_a_broker_has_an_amqp_version(reply: bytes, version: str | None) -> None:
    with served(reply) as port:
        assert network.amqp_version(port) == version


def test_another_service_is_not_mistaken_for_epmd() -> None:
    with served(b"SSH-2.0-OpenSSH\r\n") as port:
        assert network.epmd_nodes(port) is None


class Epmd:
    """A fake epmd that lists these nodes on successive requests, repeating the last list.

    None is no answer in time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: list[str] | None) -> None:
        self._names, self.ended = list(names), False
        monkeypatch.setattr(network, "_ask_epmd", self.ask)
        monkeypatch.setattr(network, "answers", lambda _: not self.ended)

    def ask(self, port: int, request: bytes) -> bytes | None:
        if self.ended:
            return None
        self.ended = request.endswith(b"k")
        names = self._names[0] if len(self._names) == 1 else self._names.pop(0)
        if names is None:
            return None
        reply = "".join(f"name {name} at port 1\n" for name in names)
        return port.to_bytes(4) + reply.encode()


@pytest.mark.parametrize(
    "before", [["fluffle"], ["fluffle_prelaunch_7"], ["epmd-starter-935311281"], [], None]
)
def test_epmd_is_stopped_once_the_nodes_are_gone(monkeypatch, before) -> None:
    epmd = Epmd(monkeypatch, before, before, [])
    assert network.stop_epmd(4369, "fluffle")
    assert epmd.ended


def test_a_shared_epmd_is_not_stopped(monkeypatch) -> None:
    epmd = Epmd(monkeypatch, ["fluffle", "other"], ["other"])
    assert not network.stop_epmd(4369, "fluffle")
    assert not epmd.ended


# --- processes ------------------------------------------------------------------------------------


def test_a_process_tree_that_ignores_sigterm_is_killed() -> None:
    script = "trap '' TERM; sh -c 'echo $$; exec sleep 600' & echo $$; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as root:
        assert root.stdout is not None
        pids = [int(root.stdout.readline()) for _ in range(2)]
        assert all(map(processes.birth, pids))
        assert processes.stop_tree(root.pid, grace_s=0) is False
        assert not any(map(processes.birth, pids))


def test_a_process_that_exits_on_sigterm_is_not_killed() -> None:
    with subprocess.Popen(["sleep", "60"]) as root:
        assert processes.stop_tree(root.pid, grace_s=30) is True
        assert root.wait() == -signal.SIGTERM


# --- configuration --------------------------------------------------------------------------------


def test_the_environment_contains_only_this_nodes_files_and_ports(info: NodeInfo) -> None:
    installation = Installation(Path("/opt/sbin/rabbitmq-server"), "unpacked", (Path("/opt/bin"),))
    variables = launch.environment(info, installation, {"PATH": "/usr/bin"})
    assert variables["PATH"] == "/opt/bin:/usr/bin"
    assert (variables["ERL_EPMD_PORT"], variables["RABBITMQ_DIST_PORT"]) == ("4", "5")
    paths = {name: value for name, value in variables.items() if value.startswith("/")} | {
        "PATH": ""
    }
    strangers = {n for n, value in paths.items() if not value.startswith(str(info.folder))}
    assert strangers == {"PATH", "RABBITMQ_CONF_ENV_FILE"}


def test_the_cookie_is_private_and_survives_a_restart(info: NodeInfo) -> None:
    cookie = info.folder / "home/.erlang.cookie"
    launch.write_files(info, "", None)
    first = cookie.read_text()
    launch.write_files(info, "", None)
    assert cookie.read_text() == first
    assert cookie.stat().st_mode & 0o777 == 0o400
    launch.write_files(info, "", "shared")
    assert cookie.read_text() == "shared"


def test_a_cookie_that_was_not_written_is_replaced(info: NodeInfo) -> None:
    cookie = info.folder / "home/.erlang.cookie"
    cookie.parent.mkdir()
    cookie.touch(mode=0o600)  # killed before it was written
    launch.write_files(info, "", None)
    assert len(cookie.read_text()) == 32
    assert cookie.stat().st_mode & 0o777 == 0o400


def test_extra_configuration_comes_last_and_wins(info: NodeInfo) -> None:
    launch.write_files(info, "consumer_timeout = 10000", None)
    written = (info.folder / "etc/rabbitmq.conf").read_text()
    assert re.findall(r"^consumer_timeout = (\d+)$", written, re.M) == ["86400000", "10000"]


def test_the_packaged_configuration_also_fits_a_container() -> None:
    settings = [
        line for line in launch.base_configuration().splitlines() if line and line[0] != "#"
    ]
    assert all(re.fullmatch(r"[\w.]+ = \S+", line) for line in settings)
    assert not any(line.startswith(("listeners", "management", "prometheus")) for line in settings)
    megabytes = launch.DISK_FREE_LIMIT_BYTES // 1_000_000
    assert f"disk_free_limit.absolute = {megabytes}MB" in settings


def test_every_port_of_the_container_is_bound_to_the_loopback_interface() -> None:
    compose = launch.packaged_file("compose.yaml").read_text()
    published = re.findall(r'^ +- "(.*):\d+"$', compose, re.M)
    assert len(published) == 3
    assert all(each.startswith("127.0.0.1:${FLUFFLE_") for each in published)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "2026-01-01 10:00:00.1+00:00 [error] <0.1.0> Error preparing configuration:\n"
            "2026-01-01 10:00:00.1+00:00 [error] <0.1.0>   - Conf file attempted to set unknown "
            "variable: no_such_key\n\nBOOT FAILED\n===========\n"
            "Error during startup: {error,failed_to_prepare_configuration}\n",
            "Conf file attempted to set unknown variable: no_such_key",
        ),
        (
            "  Starting broker...\nBOOT FAILED\n===========\nError during startup: {error,\n"
            '   {could_not_start_listener,"127.0.0.1",45671,\n      {listen_error,eaddrinuse}}}\n',
            "another program uses port 45671; choose other ports, or --port 0",
        ),
        (
            "BOOT FAILED\n===========\nException during startup:\n\n"
            "error:{badmatch,\n    {error,nodistribution}}\n\n    rabbit_prelaunch_dist:setup/1\n",
            "error:{badmatch, {error,nodistribution}}",
        ),
        (
            "./rabbitmq-server: 68: exec: erl: not found\n",
            "./rabbitmq-server: 68: exec: erl: not found",
        ),
        ("", "it printed nothing"),
    ],
)
def test_a_failed_boot_is_summarized_in_one_line(log: str, message: str) -> None:
    assert launch.failure_reason(log) == message


def test_the_reason_of_a_failed_boot_is_short() -> None:
    assert len(launch.failure_reason("BOOT FAILED\n===========\n" + "{error, term} " * 1000)) <= 240


# --- packages -------------------------------------------------------------------------------------


def test_the_newest_installed_version_is_used(tmp_path: Path) -> None:
    for version in ("3.9.27", "3.10.8", "4.0.5"):
        server = tmp_path / f"rabbitmq_server-{version}/sbin/rabbitmq-server"
        server.parent.mkdir(parents=True)
        server.touch()
    installation = packages.find_installed(tmp_path)
    assert installation is not None
    assert installation.server.parts[-3] == "rabbitmq_server-4.0.5"


def test_a_server_on_the_path_is_found(
    tmp_path: Path, programs: Callable[[str, str], None]
) -> None:
    programs("rabbitmq-server", "")
    installation = packages.find_installed(tmp_path)
    assert installation == Installation(tmp_path / "programs/rabbitmq-server", "installed")


_FAKE_DPKG = """
test "$1" = --extract || exit 1
mkdir -p "$3/usr/lib/erlang/bin" "$3/usr/lib/erlang/erts-1/bin"
mkdir -p "$3/usr/lib/rabbitmq/lib/rabbitmq_server-1/sbin"
touch "$3/usr/lib/rabbitmq/lib/rabbitmq_server-1/sbin/rabbitmq-server"
touch "$3/usr/lib/erlang/bin/erl" "$3/usr/lib/erlang/erts-1/bin/erl"
"""

# Lists the packages only after an update, and can download them only after a second one.
_FAKE_APT = """
state=$(dirname "$0")
case "$*" in
  *update) echo x >>"$state/updates" ;;
  *"-s "*) test -f "$state/updates" || { echo "E: Unable to locate package x" >&2; exit 100; }
           echo "Inst erlang-base (1 Debian [amd64])"; echo "Inst rabbitmq-server (1 Debian)" ;;
  *download*) test -s "$state/updates" || { echo "E: 404 Not Found" >&2; exit 100; }
           touch erlang-base_1_amd64.deb rabbitmq-server_1_all.deb ;;
esac
"""


@pytest.mark.parametrize("lists", ["missing", "old"])
def test_missing_or_old_package_lists_are_updated(
    tmp_path: Path, programs: Callable[[str, str], None], lists: str
) -> None:
    if lists == "old":
        (tmp_path / "programs/updates").touch()
    programs("apt-get", _FAKE_APT)
    programs("dpkg-deb", _FAKE_DPKG)
    steps: list[str] = []
    cache = tmp_path / "cache/debian"
    installation = packages.unpack(steps.append, cache)
    assert installation == packages.find_unpacked(cache)
    assert installation.origin == "unpacked"
    assert steps.count("updating the package lists") == 1
    assert [each.name for each in cache.parent.iterdir()] == ["debian"]


@pytest.mark.parametrize(
    ("dpkg", "message"),
    [
        ("echo 'write error: No space left on device' >&2; exit 2", "No space left on device"),
        ("echo 'not a Debian archive' >&2; exit 2", "not a Debian archive"),
        ("exit 0", "no Erlang runtime"),
    ],
)
def test_a_failed_unpack_leaves_nothing_behind(
    tmp_path: Path, programs: Callable[[str, str], None], dpkg: str, message: str
) -> None:
    (tmp_path / "programs/updates").write_text("x\nx\n")
    programs("apt-get", _FAKE_APT)
    programs("dpkg-deb", dpkg)
    cache = tmp_path / "cache/debian"
    with pytest.raises(BrokerError, match=message):
        packages.unpack(lambda _: None, cache)
    assert list(cache.parent.iterdir()) == []


def test_without_a_mirror_the_reason_and_the_remedies_are_named(
    tmp_path: Path, programs: Callable[[str, str], None]
) -> None:
    programs("apt-get", "echo 'E: Could not resolve the mirror' >&2; exit 100")
    with pytest.raises(BrokerError, match=r"Could not resolve the mirror.*start Docker"):
        packages.unpack(lambda _: None, tmp_path / "cache/debian")


@pytest.mark.parametrize(
    ("release", "folder"),
    [
        ({"ID": "debian", "VERSION_ID": "13", "VERSION_CODENAME": "trixie"}, "debian-13-x"),
        ({"ID": "debian", "VERSION_CODENAME": "forky"}, "debian-forky-x"),  # testing
        ({}, "unknown-0-x"),
    ],
)
def test_each_release_unpacks_into_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: dict[str, str], folder: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packages.platform, "freedesktop_os_release", lambda: release)
    monkeypatch.setattr(packages.platform, "machine", lambda: "x")
    server = tmp_path / "fluffle/rabbitmq" / folder
    server /= "usr/lib/rabbitmq/lib/rabbitmq_server-4.3.6/sbin/rabbitmq-server"
    server.parent.mkdir(parents=True)
    server.touch()
    found = packages.find_unpacked()
    assert found is not None
    assert found.server == server


# --- the container --------------------------------------------------------------------------------


def test_docker_without_an_engine_is_unavailable(programs: Callable[[str, str], None]) -> None:
    programs("docker", 'test "$1" = compose')
    assert not container.available()
    programs("docker", "exit 0")
    assert container.available()


def test_the_container_gets_the_ports_and_the_configuration(
    info: NodeInfo, programs: Callable[[str, str], None]
) -> None:
    programs("docker", f'echo "$*|$FLUFFLE_AMQP_PORT|$FLUFFLE_CONF" >>"{info.folder}/calls"')
    container.start(info, "consumer_timeout = 10000")
    container.stop(info)
    started, stopped = (info.folder / "calls").read_text().splitlines()
    arguments, port, conf = started.split("|")
    assert arguments.endswith("up --detach --wait")
    assert port == "1"
    assert Path(conf).read_text().endswith("consumer_timeout = 10000\n")
    assert stopped.split(" --file ")[0] == arguments.split(" --file ")[0]


def test_an_error_of_docker_is_one_line(
    info: NodeInfo, programs: Callable[[str, str], None]
) -> None:
    programs("docker", "echo pulling >&2; echo 'port is already allocated' >&2; exit 1")
    with pytest.raises(BrokerError, match=r"^docker compose up failed: port is already allocated"):
        container.start(info, "")


def test_the_log_of_a_failed_container_survives_its_removal(
    info: NodeInfo, programs: Callable[[str, str], None]
) -> None:
    log = 'case "$*" in *" logs "*) echo "rabbit: bad configuration" ;; '
    programs("docker", f"{log}*) echo 'container exited (1)' >&2; exit 1 ;; esac")
    with pytest.raises(BrokerError, match=r"up failed: container exited \(1\) \(.* log is in "):
        container.start(info, "")
    assert (info.logs / "startup.log").read_text() == "rabbit: bad configuration\n"


def test_a_container_cannot_be_stopped_once_docker_is_gone(
    tmp_path: Path, info: NodeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.save(dataclasses.replace(info, pid=None, born=None, started_as="docker"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerError, match="'docker' is not installed"):
        node.down(tmp_path)
