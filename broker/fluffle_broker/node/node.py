"""A private RabbitMQ node in a state folder: start it, find it, stop it.

Everything of a node is under ``<state>/broker/``: ``node.json`` (see `record`), ``etc/``,
``data/``, ``log/``, ``home/`` (the Erlang cookie) and a ``rabbitmqctl`` that talks to this node.
Several nodes live side by side when each has its own state folder and ports. The record is there
from the moment the VM is launched until `down` has stopped it, so that nothing that interrupts
either of them leaves a node that nobody can find.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fluffle_broker.node import (
    container,
    launch,
    network,
    packages,
    policies,
    processes,
    record,
)
from fluffle_broker.node.packages import Installation
from fluffle_broker.node.record import NodeInfo, Ports
from fluffle_common.errors import BrokerError
from fluffle_common.protocol import topology

__all__ = ["NodeInfo", "Ports", "down", "running_node", "up"]

Say = Callable[[str], None]

_BOOT_TIMEOUT_S = 120.0
_POLL_S = 0.05
_UNQUOTABLE = frozenset("'\"`")


def _silent(_: str) -> None:
    """Say nothing."""


def running_node(state: Path) -> NodeInfo | None:
    """Return the node of a state folder, or None where none is up (or not up yet)."""
    info = record.load(record.broker_folder(state))
    if info is None or not _lives(info):
        return None
    return info if network.answers(info.ports.amqp) else None


def up(
    state: Path,
    *,
    ports: Ports | None = None,
    node_name: str = "fluffle",
    extra_conf: str = "",
    cookie: str | None = None,
    say: Say = _silent,
) -> NodeInfo:
    """Start the node of a state folder and wait until it serves; return it if it is up already.

    Data of an earlier run in the same folder, under the same node name, is served again, however
    that run ended.

    Args:
        state: The state folder; made if it is missing.
        ports: Where to listen, on the loopback interface; 0 chooses a free port.
        node_name: Erlang's name of the node, without a host.
        extra_conf: More lines of rabbitmq.conf; they win over those of the node.
        cookie: The secret that Erlang nodes of one cluster share; one of its own by default.
        say: Is told what is being done, in a few words each time.

    Raises:
        BrokerError: The node cannot be started; nothing is left running then.
    """
    folder = record.broker_folder(state)
    with _explained(folder), _alone(folder, say):
        known = record.load(folder)
        if known is not None and (ready := _await_ready(known)):
            return ready
        if known is not None:
            say(f"the earlier node {known.node_name} is gone; cleaning up after it")
            _forget(known)
        wanted = ports or Ports()
        _require_free(wanted)
        _require_plain(folder)
        _require_space(folder, extra_conf)
        installation = _find(say)
        info = _plan(folder, _chosen(wanted), node_name, installation)
        if installation is None:
            return _start_container(info, extra_conf, say)
        return _start(info, installation, extra_conf, cookie, say)


def down(state: Path, *, grace_s: float = 30.0, say: Say = _silent) -> bool:
    """Stop the node of a state folder and everything that came with it; its data stays.

    Args:
        state: The state folder.
        grace_s: How long it may take to stop by itself before it is killed. RabbitMQ 3.10 takes
            6 s; 0 kills at once, for a node whose data nobody will need.
        say: Is told what is being done.

    Returns:
        Whether there was one to stop.
    """
    folder = record.broker_folder(state)
    if not folder.is_dir():
        return False
    with _explained(folder), _alone(folder, say):
        info = record.load(folder)
        if info is None:
            return False
        was_alive = _lives(info)
        if was_alive:
            say(f"stopping {info.node_name}")
        _forget(info, grace_s=grace_s)
        return was_alive


def _start(
    info: NodeInfo, installation: Installation, extra_conf: str, cookie: str | None, say: Say
) -> NodeInfo:
    launch.write_files(info, extra_conf, cookie)
    launch.write_rabbitmqctl(info, installation)
    say(f"starting the {installation.origin} RabbitMQ")
    try:
        pid = launch.launch(info, installation)
        info = dataclasses.replace(info, pid=pid, born=processes.birth(pid))
        record.save(info)
        if ready := _await_ready(info):
            _bound(ready, say)
            return ready
        raise BrokerError(launch.why_it_failed(info))
    except BaseException:  # Ctrl-C as well: what was begun is ended
        _forget(info, grace_s=0)
        raise


def _start_container(info: NodeInfo, extra_conf: str, say: Say) -> NodeInfo:
    say("starting RabbitMQ in a container (the first time, Docker downloads the image)")
    record.save(info)
    try:
        container.start(info, extra_conf)
        if ready := _await_ready(info):
            _bound(ready, say)
            return ready
        raise BrokerError("the container ended at once; 'docker ps --all' lists it")
    except BaseException:
        with contextlib.suppress(BrokerError):  # the first error tells more
            _forget(info)
        raise


def _bound(info: NodeInfo, say: Say) -> None:
    """Bound the queues of every federation, unless an operator has said otherwise before."""
    base = info.management_url.rstrip("/")
    try:
        policies.apply(topology.policies(), info.url, base, keep=True)
    except BrokerError as why:  # such as guest's password, which its operator has changed
        say(f"the limits of queues are not set: {why}")


def _await_ready(info: NodeInfo) -> NodeInfo | None:
    """Wait until all listeners answer, AMQP in its own tongue, and complete the record.

    Returns:
        The completed record, or None when the node has ended.
    """
    others = (info.ports.management, info.ports.prometheus)
    end = time.monotonic() + _BOOT_TIMEOUT_S
    while _lives(info):
        # RabbitMQ opens the AMQP port last, and looking at a port costs the boot nothing, while
        # each rabbitmqctl would cost it a second of CPU.
        version = network.amqp_version(info.ports.amqp)
        if version is not None and all(network.answers(port) for port in others):
            ready = dataclasses.replace(info, version=version)
            record.save(ready)
            return ready
        if time.monotonic() > end:
            raise BrokerError(
                f"RabbitMQ (pid {info.pid}) does not answer on port {info.ports.amqp} after "
                f"{_BOOT_TIMEOUT_S:.0f} s; see {info.logs}; 'fluffle broker down' ends it"
            )
        time.sleep(_POLL_S)
    return None


def _lives(info: NodeInfo) -> bool:
    if info.pid is None:  # in a container, whose processes are not ours to see
        return info.started_as == "docker" and network.answers(info.ports.amqp)
    return info.born is not None and processes.birth(info.pid) == info.born


def _forget(info: NodeInfo, *, grace_s: float = 30.0) -> None:
    """Stop whatever is left of a node, then its record: gone is only what is known to be gone."""
    if info.started_as == "docker":
        container.stop(info)
    elif info.pid is not None and _lives(info):
        processes.stop_tree(info.pid, grace_s=grace_s)
    network.stop_epmd(info.ports.epmd, info.node_name.partition("@")[0])
    record.remove(info.folder)


def _find(say: Say) -> Installation | None:
    """Find a RabbitMQ, or get one; None means: in a container."""
    found = packages.find_installed() or packages.find_unpacked()
    if found is not None:
        return found
    if shutil.which("apt-get"):
        try:
            return packages.unpack(say)
        except BrokerError as failed:
            if not container.available():
                raise
            say(f"{failed}; trying Docker")
            return None
    if container.available():
        return None
    raise BrokerError(f"there is no RabbitMQ on this machine; {packages.REMEDIES}")


def _require_free(ports: Ports) -> None:
    given = [port for port in dataclasses.astuple(ports) if port]
    if len(set(given)) < len(given):
        raise BrokerError(f"the same port is given twice ({min(given)}…); choose different ones")
    for port, what, option in (
        (ports.amqp, "AMQP", "--port"),
        (ports.management, "management", "--management-port"),
        (ports.prometheus, "prometheus", "--prometheus-port"),
        (ports.distribution, "Erlang distribution", "--port 0"),
    ):
        if port:
            network.require_free(port, what, option)
    # An epmd that is there already is the one to share.
    if ports.epmd and network.epmd_nodes(ports.epmd) is None:
        network.require_free(ports.epmd, "epmd", "--port 0")


def _require_plain(folder: Path) -> None:
    """Refuse a path at which RabbitMQ hangs without a word: it hands it to a shell, for ``df``."""
    if found := _UNQUOTABLE.intersection(str(folder)):
        raise BrokerError(
            f"RabbitMQ cannot boot in a folder with {' or '.join(sorted(found))} in its path "
            f"({folder}); choose another one with --state"
        )


def _require_space(folder: Path, extra_conf: str) -> None:
    """Refuse a disk on which the node would boot, and then hold every publisher for good."""
    free = shutil.disk_usage(folder).free
    if free < launch.DISK_FREE_LIMIT_BYTES and "disk_free_limit" not in extra_conf:
        raise BrokerError(
            f"only {free / 1000000.0:.0f} MB are free in {folder}, and RabbitMQ accepts no "
            f"messages below {launch.DISK_FREE_LIMIT_BYTES / 1000000.0:.0f} MB; make room or "
            "choose another --state"
        )


def _chosen(ports: Ports) -> Ports:
    asked = dataclasses.asdict(ports)
    free = iter(network.free_ports(len(asked)))
    return Ports(**{name: port or next(free) for name, port in asked.items()})


def _plan(
    folder: Path, ports: Ports, node_name: str, installation: Installation | None
) -> NodeInfo:
    here = network.LOOPBACK
    return NodeInfo(
        url=f"amqp://guest:guest@{here}:{ports.amqp}/",
        management_url=f"http://{here}:{ports.management}/",
        prometheus_url=f"http://{here}:{ports.prometheus}/metrics",
        # The host is localhost, so that the data outlives a change of the machine's name.
        node_name=f"{node_name}@localhost" if installation else container.NODE_NAME,
        ports=ports,
        pid=None,
        born=None,
        started_as=installation.origin if installation else "docker",
        version="",
        folder=folder,
    )


@contextlib.contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Let one `up` or `down` at a time work in a folder; the system unlocks it if we are killed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in the queues is private
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another 'fluffle broker' command in this folder")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line for the user."""
    try:
        yield
    except OSError as refused:
        where = str(refused.filename or folder)
        if len(where) > 120:
            where = f"{where[:60]}…{where[-59:]}"
        raise BrokerError(
            f"cannot use the state folder: {where}: {refused.strerror or refused}; "
            "choose another one with --state (FLUFFLE_STATE)"
        ) from refused
