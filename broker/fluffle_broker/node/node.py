"""Starting, finding and stopping the private RabbitMQ node of a state folder.

All files of a node are under ``<state>/broker/``: ``node.json`` (see `record`), ``etc/``,
``data/``, ``log/``, ``home/`` (the Erlang cookie) and a ``rabbitmqctl`` for this node. Several
nodes can run at the same time, each with its own state folder and ports. The record exists from
the launch of the VM until `down` has stopped it, so that an interruption never leaves a node that
nobody can find.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fluffle_broker.node import container, launch, network, packages, policies, processes, record
from fluffle_broker.node.packages import Installation
from fluffle_broker.node.record import NodeInfo, Ports
from fluffle_common.errors import BrokerError
from fluffle_common.protocol import topology
from fluffle_common.transport.rabbitmq.management import Management

__all__ = ["NodeInfo", "Ports", "down", "running_node", "up"]

Report = Callable[[str], None]

_BOOT_TIMEOUT_S = 120.0
_POLL_S = 0.05
_UNQUOTABLE = frozenset("'\"`")


def running_node(state: Path) -> NodeInfo | None:
    """Return the node of a state folder, or None if none is up yet or any more."""
    info = record.load(record.broker_folder(state))
    if info is None or not _is_alive(info):
        return None
    return info if network.answers(info.ports.amqp) else None


def up(
    state: Path,
    *,
    ports: Ports | None = None,
    node_name: str = "fluffle",
    extra_conf: str = "",
    cookie: str | None = None,
    report: Report = lambda _: None,
) -> NodeInfo:
    """Start the node of a state folder and wait until it is ready; return it if it is already up.

    The node serves the data of earlier runs in the same folder under the same node name, even
    after a crash.

    ``ports`` are those on the loopback interface, 0 for a free one, and ``node_name`` is Erlang's
    name, without a host. ``extra_conf`` has more lines of rabbitmq.conf, which override the usual
    ones. ``cookie`` is the secret that the Erlang nodes of a cluster share; by default, it is
    random. ``report`` is called with a few words about each step.

    Raises:
        BrokerError: if the node cannot be started; nothing is left running then.
    """
    folder = record.broker_folder(state)
    with _readable_errors(folder), _locked(folder, report):
        known = record.load(folder)
        if known is not None and (ready := _await_ready(known)):
            return ready
        if known is not None:
            report(f"the earlier node {known.node_name} is gone; cleaning up after it")
            _clean_up(known)
        wanted = ports or Ports()
        _require_free(wanted)
        _require_plain_path(folder)
        _require_space(folder, extra_conf)
        installation = _find_or_unpack(report)
        info = _describe(folder, _with_free_ports(wanted), node_name, installation)
        return _start(info, installation, extra_conf, cookie, report)


def down(state: Path, *, grace_s: float = 30.0, report: Report = lambda _: None) -> bool:
    """Stop the node of a state folder, keep its data, and return whether it was running.

    After ``grace_s`` without a clean stop, which takes RabbitMQ 3.10 6 s, it is killed; 0 kills it
    at once, for a node whose data nobody needs. ``report`` is called with a few words about each
    step.
    """
    folder = record.broker_folder(state)
    if not folder.is_dir():
        return False
    with _readable_errors(folder), _locked(folder, report):
        info = record.load(folder)
        if info is None:
            return False
        was_alive = _is_alive(info)
        if was_alive:
            report(f"stopping {info.node_name}")
        _clean_up(info, grace_s=grace_s)
        return was_alive


def _start(
    info: NodeInfo,
    installation: Installation | None,
    extra_conf: str,
    cookie: str | None,
    report: Report,
) -> NodeInfo:
    """Start the node, in a container without an installation, and wait until it is ready."""
    try:
        if installation is None:
            report("starting RabbitMQ in a container (the first time, Docker downloads the image)")
            record.save(info)
            container.start(info, extra_conf)
        else:
            launch.write_files(info, extra_conf, cookie)
            launch.write_rabbitmqctl(info, installation)
            report(f"starting the {installation.origin} RabbitMQ")
            pid = launch.launch(info, installation)
            info = dataclasses.replace(info, pid=pid, born=processes.birth(pid))
            record.save(info)
        if ready := _await_ready(info):
            _limit_queues(ready, report)
            return ready
        if installation is None:
            log = container.saved_log(info)
            raise BrokerError(f"the RabbitMQ container exited before it was ready{log}")
        raise BrokerError(launch.boot_failure(info))
    except BaseException:  # Ctrl-C as well: leave nothing running
        with contextlib.suppress(BrokerError):  # the first error is the one to report
            _clean_up(info, grace_s=0)
        raise


def _limit_queues(info: NodeInfo, report: Report) -> None:
    """Set the policies that limit queues, except those that an operator has changed."""
    try:
        policies.apply(topology.policies(), Management(info.url, info.management_url), keep=True)
    except BrokerError as why:  # for example, the password of guest was changed
        report(f"the queue limits are not set: {why}")


def _await_ready(info: NodeInfo) -> NodeInfo | None:
    """Wait until all listeners answer; return the complete record, or None if the node is gone."""
    others = (info.ports.management, info.ports.prometheus)
    end = time.monotonic() + _BOOT_TIMEOUT_S
    while _is_alive(info):
        # Probing ports is cheap, while each call of rabbitmqctl takes a second of CPU time.
        # RabbitMQ opens the AMQP port last.
        version = network.amqp_version(info.ports.amqp)
        if version is not None and all(network.answers(port) for port in others):
            ready = dataclasses.replace(info, version=version)
            record.save(ready)
            return ready
        if time.monotonic() > end:
            raise BrokerError(
                f"RabbitMQ (pid {info.pid}) did not answer on port {info.ports.amqp} within "
                f"{_BOOT_TIMEOUT_S:.0f} s; read the logs in {info.logs}, and run 'fluffle broker "
                "down' before you try again"
            )
        time.sleep(_POLL_S)
    return None


def _is_alive(info: NodeInfo) -> bool:
    if info.pid is None:  # in a container, whose processes are not visible here
        return info.started_as == "docker" and network.answers(info.ports.amqp)
    return info.born is not None and processes.birth(info.pid) == info.born


def _clean_up(info: NodeInfo, *, grace_s: float = 30.0) -> None:
    """Stop what is left of a node, then remove its record, which must come last."""
    if info.started_as == "docker":
        container.stop(info)
    elif info.pid is not None and _is_alive(info):
        processes.stop_tree(info.pid, grace_s=grace_s)
    network.stop_epmd(info.ports.epmd, info.node_name.partition("@")[0])
    record.remove(info.folder)


def _find_or_unpack(report: Report) -> Installation | None:
    """Find or unpack a RabbitMQ; None means that it has to run in a container."""
    installation = packages.find_installed() or packages.find_unpacked()
    if installation is not None:
        return installation
    if shutil.which("apt-get"):
        try:
            return packages.unpack(report)
        except BrokerError as failed:
            if not container.available():
                raise
            cause, _, _ = str(failed).partition(";")  # without the remedy
            report(f"{cause}; trying Docker")
            return None
    if container.available():
        return None
    raise BrokerError(f"there is no RabbitMQ on this machine; {packages.REMEDIES}")


def _require_free(ports: Ports) -> None:
    given = [port for port in dataclasses.astuple(ports) if port]
    if repeated := [port for port in given if given.count(port) > 1]:
        raise BrokerError(f"port {repeated[0]} is given twice; choose different ports")
    for port, what, option in (
        (ports.amqp, "AMQP", "--port"),
        (ports.management, "management", "--management-port"),
        (ports.prometheus, "prometheus", "--prometheus-port"),
        (ports.distribution, "Erlang distribution", "--port 0"),
    ):
        if port:
            network.require_free(port, what, option)
    # An epmd that already runs on the port is shared.
    if ports.epmd and network.epmd_nodes(ports.epmd) is None:
        network.require_free(ports.epmd, "epmd", "--port 0")


def _require_plain_path(folder: Path) -> None:
    """Refuse a path with quotes: RabbitMQ passes it to a shell for ``df``, and then hangs."""
    if quotes := _UNQUOTABLE.intersection(str(folder)):
        raise BrokerError(
            f"RabbitMQ cannot start in {folder}, because the path contains "
            f"{' and '.join(sorted(quotes))}; choose another folder with --state"
        )


def _require_space(folder: Path, extra_conf: str) -> None:
    """Refuse a disk that is so full that the node would block every publisher."""
    free = shutil.disk_usage(folder).free
    if free < launch.DISK_FREE_LIMIT_BYTES and "disk_free_limit" not in extra_conf:
        raise BrokerError(
            f"{folder} has only {free / 1e6:.0f} MB of free space, but RabbitMQ needs at least "
            f"{launch.DISK_FREE_LIMIT_BYTES / 1e6:.0f} MB to accept messages; free some space, or "
            "choose another folder with --state"
        )


def _with_free_ports(ports: Ports) -> Ports:
    given = dataclasses.asdict(ports)
    # A port that was given is not in use yet, so it may be among the free ones.
    free = iter(set(network.free_ports(2 * len(given))) - set(given.values()))
    return Ports(**{name: port or next(free) for name, port in given.items()})


def _describe(
    folder: Path, ports: Ports, node_name: str, installation: Installation | None
) -> NodeInfo:
    here = network.LOOPBACK
    return NodeInfo(
        url=f"amqp://guest:guest@{here}:{ports.amqp}/",
        management_url=f"http://{here}:{ports.management}/",
        prometheus_url=f"http://{here}:{ports.prometheus}/metrics",
        # The host is localhost, so that the data survives a change of the machine's name.
        node_name=f"{node_name}@localhost" if installation else container.NODE_NAME,
        ports=ports,
        pid=None,
        born=None,
        started_as=installation.origin if installation else "docker",
        version="",
        folder=folder,
    )


@contextlib.contextmanager
def _locked(folder: Path, report: Report) -> Iterator[None]:
    """Lock a folder against other `up` and `down` calls; a killed process unlocks it as well."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # queues hold private data
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another 'fluffle broker' command in this folder")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into one line for the user."""
    try:
        yield
    except OSError as refused:
        where, reason = refused.filename or folder, refused.strerror or refused
        raise BrokerError(
            f"cannot use the state folder ({where}: {reason}); choose another folder with --state "
            "(FLUFFLE_STATE)"
        ) from refused
