"""Launching RabbitMQ with private files and ports, and explaining a failed boot."""

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
"""The ``disk_free_limit`` in rabbitmq.conf."""

_PLUGINS = "[rabbitmq_management,rabbitmq_prometheus].\n"

# Prefixes of inherited variables that would configure our node like another one.
_FOREIGN = ("RABBITMQ_", "ERL_", "NOTIFY_SOCKET", "CONF_ENV_FILE")

# For the connections between Erlang nodes, including rabbitmqctl.
_LOOPBACK_ONLY = "-kernel inet_dist_use_interface {127,0,0,1}"

_LOG_PREFIX = re.compile(r"^\d{4}-\S+ \S+ \[\w+\] <[\d.]+> ?")
_LONGEST_REASON = 240

_A_PORT = "one of RabbitMQ's ports"
# Erlang's error codes, which may appear anywhere in the nested terms of a failure.
_SYSTEM_ERRORS = {
    "enospc": "there is no space left on the disk; make room or choose another --state",
    "eaddrinuse": f"another program uses {_A_PORT}; choose other ports, or --port 0",
    "eacces": "RabbitMQ has no access to the state folder; check who owns the folder",
    "erofs": "the state folder is on a read-only disk; choose another --state",
    "emfile": "too many files are open; raise the limit with 'ulimit -n'",
}

# The shell exits at once, so that the node is not our child: it leaves no zombie, and the program
# that started it is not affected by its exit. Every script uses exec, so $! is the VM's pid.
_LAUNCH = 'cd "$1" && { "./$2" </dev/null >"$3" 2>&1 & echo $!; }'


def base_configuration() -> str:
    """Return the annotated rabbitmq.conf that every node starts with."""
    return packaged_file("rabbitmq.conf").read_text()


def packaged_file(name: str) -> Path:
    """Return the path of a data file: in a wheel inside the package, in a checkout next to it."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.exists() else package.parent / name


def listeners(ports: Ports) -> str:
    """Return the lines of rabbitmq.conf that set where the node listens."""
    return (
        f"listeners.tcp.1 = {network.LOOPBACK}:{ports.amqp}\n"
        f"management.tcp.ip = {network.LOOPBACK}\n"
        f"management.tcp.port = {ports.management}\n"
        f"prometheus.tcp.ip = {network.LOOPBACK}\n"
        f"prometheus.tcp.port = {ports.prometheus}\n"
        "log.console = false\n"
    )


def write_files(info: NodeInfo, extra_conf: str, cookie: str | None) -> None:
    """Write the configuration files and the Erlang cookie; leave the data alone."""
    folder = info.folder
    for name in ("data", "log", "home", "etc/conf.d"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    parts = (base_configuration(), "# This node:", listeners(info.ports), extra_conf)
    (folder / "etc/rabbitmq.conf").write_text("\n".join(parts) + "\n")
    (folder / "etc/enabled_plugins").write_text(_PLUGINS)
    secret = folder / "home/.erlang.cookie"
    # It is empty if an earlier call was killed before it had written the cookie.
    if cookie is not None or not (secret.exists() and secret.stat().st_size):
        secret.unlink(missing_ok=True)
        secret.touch(mode=0o600)
        secret.write_text(cookie or secrets.token_hex(16))
        secret.chmod(0o400)  # Erlang refuses a cookie that others can read


def environment(
    info: NodeInfo, installation: Installation, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables that keep every file and port of the node private."""
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
        "ERL_CRASH_DUMP_SECONDS": "0",  # no crash dump; the logs are more useful
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
        # Makes the scripts exec the VM instead of waiting for it, so that its pid is known.
        "RUNNING_UNDER_SYSTEMD": "true",
    }


def launch(info: NodeInfo, installation: Installation) -> int:
    """Start the VM in its own session, with none of our files open; return its pid."""
    server = installation.server
    shell = subprocess.Popen(
        # Started from its own folder, because the scripts do not quote their own path.
        ["/bin/sh", "-c", _LAUNCH, "sh", server.parent, server.name, startup_log(info)],
        env={
            **{name: of for name, of in os.environ.items() if not name.startswith(_FOREIGN)},
            **environment(info, installation, os.environ),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pid, error = shell.communicate()
    except BaseException:
        # Ctrl-C does not reach the new session, so stop what was started there.
        pid, _ = shell.communicate()
        if pid:
            processes.stop_tree(int(pid), grace_s=0)
        raise
    if not pid:
        raise BrokerError(f"cannot run {server}: {error.strip() or 'the shell gave no reason'}")
    return int(pid)


def write_rabbitmqctl(info: NodeInfo, installation: Installation) -> None:
    """Write a `rabbitmqctl` script that controls this node."""
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
    """Return the path of the file that captures the VM's own output."""
    return info.logs / "startup.log"


def boot_failure(info: NodeInfo) -> str:
    """Return in one line why a boot failed and where the full output is."""
    log = startup_log(info)
    try:
        reason = failure_reason(log.read_text(errors="replace"))
    except OSError as unreadable:
        reason = str(unreadable)
    return f"RabbitMQ did not start: {reason} (the full output is in {log})"


def failure_reason(log: str) -> str:
    """Return the line that helps the user most from the output of a failed boot."""
    lines = [_LOG_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    # Errors in the configuration file are printed as a list.
    if errors := [line[4:] for line in lines if line.startswith("  - ")]:
        return "; ".join(dict.fromkeys(errors))
    for code, meaning in _SYSTEM_ERRORS.items():
        if re.search(rf"\b{code}\b", log):
            port = re.search(r'could_not_start_listener,"[^"]*",\s*(\d+)', log)
            return meaning.replace(_A_PORT, f"port {port[1]}") if port else meaning
    # Otherwise the start of the first paragraph, which is usually a nested Erlang term.
    text = "\n".join(lines)
    failed = text.rpartition("BOOT FAILED\n===========\n")[2].strip() or "it printed nothing"
    paragraph = failed.partition("\n\n")[2 if failed.startswith("Exception during") else 0]
    return textwrap.shorten(
        paragraph.strip().partition("\n\n")[0], _LONGEST_REASON, placeholder=" …"
    )
