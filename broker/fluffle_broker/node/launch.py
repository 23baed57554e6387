"""Starting an Erlang VM with RabbitMQ in it, private in every file and port; why one failed."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
import textwrap
from collections.abc import Mapping
from pathlib import Path

from fluffle_broker.node import network, processes
from fluffle_broker.node.packages import Installation
from fluffle_broker.node.record import NodeInfo, Ports
from fluffle_common.errors import BrokerError

DISK_FREE_LIMIT_BYTES = 256_000_000
"""What rabbitmq.conf says of ``disk_free_limit``."""

_PLUGINS = "[rabbitmq_management,rabbitmq_prometheus].\n"

# What others set for another node must not reach ours.
_FOREIGN = ("RABBITMQ_", "ERL_", "NOTIFY_SOCKET", "CONF_ENV_FILE")

# Between Erlang nodes, rabbitmqctl among them.
_LOOPBACK_ONLY = "-kernel inet_dist_use_interface {127,0,0,1}"

_LOG_PREFIX = re.compile(r"^\d{4}-\S+ \S+ \[\w+\] <[\d.]+> ?")
_LONGEST_REASON = 240

# As Erlang spells them, wherever they stand in the nested terms of a failure.
_SYSTEM_ERRORS = {
    "enospc": "there is no space left on the disk; make room or choose another --state",
    "eaddrinuse": "another program took one of its ports; choose other ports, or --port 0",
    "eacces": "it may not read or write its own files; check who owns the state folder",
    "erofs": "the state folder is on a read-only disk; choose another --state",
    "emfile": "too many files are open; raise 'ulimit -n'",
    "duplicate_node_name": (
        "a node with this name is already running at this epmd; choose another --node-name"
    ),
}

# The shell ends at once, so that the node is a child of nobody here: it is not left a zombie, and
# its end does not concern the program that started it. $! stays true, as everything is exec'd.
_LAUNCH = 'cd "$1" && { "./$2" </dev/null >"$3" 2>&1 & echo $!; }'


def base_configuration() -> str:
    """Read the annotated rabbitmq.conf that every node starts with."""
    return shipped("rabbitmq.conf").read_text()


def shipped(name: str) -> Path:
    """Find a file that comes with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.exists() else package.parent / name


def listeners(ports: Ports) -> str:
    """Write the part of rabbitmq.conf that says where the node listens."""
    return (
        f"listeners.tcp.1 = {network.LOOPBACK}:{ports.amqp}\n"
        f"management.tcp.ip = {network.LOOPBACK}\n"
        f"management.tcp.port = {ports.management}\n"
        f"prometheus.tcp.ip = {network.LOOPBACK}\n"
        f"prometheus.tcp.port = {ports.prometheus}\n"
        "log.console = false\n"
    )


def write_files(info: NodeInfo, extra_conf: str, cookie: str | None) -> None:
    """Write what the node reads when it boots; its data is left alone."""
    folder = info.folder
    for name in ("data", "log", "home", "etc/conf.d"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    parts = (base_configuration(), "# This node:", listeners(info.ports), extra_conf)
    (folder / "etc/rabbitmq.conf").write_text("\n".join(parts) + "\n")
    (folder / "etc/enabled_plugins").write_text(_PLUGINS)
    secret = folder / "home/.erlang.cookie"
    if cookie is not None or not secret.exists():
        secret.unlink(missing_ok=True)
        secret.touch(mode=0o600)
        secret.write_text(cookie or secrets.token_hex(16))
        secret.chmod(0o400)  # Erlang refuses a cookie that others can read


def environment(
    info: NodeInfo, installation: Installation, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Compose the variables that keep every file and port of the node private."""
    folder = info.folder
    path = [*map(str, installation.path), inherited.get("PATH", os.defpath)]
    libraries = list(map(str, installation.libraries))
    if libraries and "LD_LIBRARY_PATH" in inherited:
        libraries.append(inherited["LD_LIBRARY_PATH"])
    return {
        **({"LD_LIBRARY_PATH": os.pathsep.join(libraries)} if libraries else {}),
        "PATH": os.pathsep.join(path),
        "LC_ALL": "C.UTF-8",
        "HOME": str(folder / "home"),
        "ERL_CRASH_DUMP_SECONDS": "0",  # no dump: the logs tell more, and sooner
        "ERL_EPMD_PORT": str(info.ports.epmd),
        "ERL_EPMD_ADDRESS": network.LOOPBACK,
        "RABBITMQ_NODENAME": info.node_name,
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_CONFIG_FILE": str(folder / "etc/rabbitmq.conf"),
        "RABBITMQ_CONFIG_FILES": str(folder / "etc/conf.d"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "etc/advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "etc/enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "data/config"),
        "RABBITMQ_FEATURE_FLAGS_FILE": str(folder / "data/feature_flags"),
        "RABBITMQ_PID_FILE": str(folder / "data/node.pid"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_DIST_PORT": str(info.ports.distribution),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _LOOPBACK_ONLY,
        "RABBITMQ_CTL_ERL_ARGS": _LOOPBACK_ONLY,
        # The scripts then become the VM instead of waiting for it: one process less, and its pid
        # is known from the start.
        "RUNNING_UNDER_SYSTEMD": "true",
    }


def launch(info: NodeInfo, installation: Installation) -> int:
    """Start the VM in a session of its own, holding no file of ours; return its pid."""
    server = installation.server
    shell = subprocess.Popen(
        # Called from its own folder, as the scripts do not quote the path they are called by.
        ["/bin/sh", "-c", _LAUNCH, "sh", server.parent, server.name, startup_log(info)],
        env={**_without_foreign(os.environ), **environment(info, installation, os.environ)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pid, told = shell.communicate()
    except BaseException:
        # Ctrl-C does not reach the new session: learn what was started there, and end it.
        pid, _ = shell.communicate()
        if pid:
            processes.stop_tree(int(pid), grace_s=0)
        raise
    if not pid:
        raise BrokerError(f"cannot run {server}: {told.strip() or 'the shell gave no reason'}")
    return int(pid)


def write_rabbitmqctl(info: NodeInfo, installation: Installation) -> None:
    """Write a `rabbitmqctl` that talks to this node and no other."""
    variables = environment(info, installation, os.environ)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    script = info.folder / "rabbitmqctl"
    script.write_text(
        "\n".join(
            [
                "#!/bin/sh",
                "# rabbitmqctl for the node of this folder; written by 'fluffle broker up'",
                *lines,
                f"cd {shlex.quote(str(installation.server.parent))} || exit",
                'exec ./rabbitmqctl "$@"\n',
            ]
        )
    )
    script.chmod(0o755)


def startup_log(info: NodeInfo) -> Path:
    """Name the file with what the VM prints before and beside RabbitMQ's own log."""
    return info.logs / "startup.log"


def why_it_failed(info: NodeInfo) -> str:
    """Tell in one line why a boot failed, and where to read on."""
    log = startup_log(info)
    try:
        reason = telling_line(log.read_text(errors="replace"))
    except OSError as unreadable:
        reason = str(unreadable)
    return f"RabbitMQ did not start: {reason}; the full output is in {log}"


def telling_line(log: str) -> str:
    """Find what matters to a user in the output of a boot that failed."""
    lines = [_LOG_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    # What the configuration's parser found wrong is a list.
    if found := [line[4:] for line in lines if line.startswith("  - ")]:
        return "; ".join(dict.fromkeys(found))
    for code, meaning in _SYSTEM_ERRORS.items():
        if re.search(rf"\b{code}\b", log):
            port = re.search(r'could_not_start_listener,"[^"]*",\s*(\d+)', log)
            return f"{meaning} (port {port[1]})" if port else meaning
    # Of Erlang's nested terms the beginning says most.
    text = "\n".join(lines)
    failed = text.rpartition("BOOT FAILED\n===========\n")[2].strip() or "it printed nothing"
    paragraph = failed.partition("\n\n")[2 if failed.startswith("Exception during") else 0]
    return textwrap.shorten(
        paragraph.strip().partition("\n\n")[0], _LONGEST_REASON, placeholder=" …"
    )


def _without_foreign(inherited: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in inherited.items() if not name.startswith(_FOREIGN)}
