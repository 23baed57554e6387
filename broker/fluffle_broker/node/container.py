"""A node in a Docker container, for machines without RabbitMQ and without apt."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess

from fluffle_broker.node import launch
from fluffle_broker.node.record import NodeInfo
from fluffle_common.errors import BrokerError

NODE_NAME = "rabbit@fluffle"


def available() -> bool:
    """Return whether Docker with compose is installed and its engine runs."""
    return bool(shutil.which("docker")) and all(
        subprocess.run(["docker", *probe], capture_output=True, check=False).returncode == 0
        for probe in (["compose", "version"], ["info"])
    )


def start(info: NodeInfo, extra_conf: str) -> None:
    """Start the container and wait until its health check passes."""
    conf = info.folder / "etc/container.conf"
    conf.parent.mkdir(parents=True, exist_ok=True)
    # The image sets the listeners; compose.yaml maps this machine's ports to them.
    conf.write_text(f"{launch.base_configuration()}\n{extra_conf}\n")
    conf.chmod(0o644)  # the container reads it as another user
    try:
        _compose(info, "up", "--detach", "--wait")
    except BrokerError as failed:
        raise BrokerError(f"{failed}{saved_log(info)}") from None


def saved_log(info: NodeInfo) -> str:
    """Save the log of a container that failed, and return where, as the end of an error.

    The log goes with the container, which ``stop`` removes.
    """
    try:
        text = _compose(info, "logs", "--no-color", "--no-log-prefix")
    except BrokerError:
        text = ""
    if not text.strip():  # no container was made
        return ""
    log = launch.startup_log(info)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text)
    return f" (the container's log is in {log})"


def stop(info: NodeInfo) -> None:
    """Stop and remove the container, but keep the volume with its data."""
    _compose(info, "down")


def _compose(info: NodeInfo, *arguments: str) -> str:
    """Run a command of docker compose and return its output."""
    # One project for each folder, so that several nodes can run at the same time.
    project = "fluffle-" + hashlib.sha256(os.fsencode(info.folder)).hexdigest()[:12]
    compose = str(launch.packaged_file("compose.yaml"))
    docker = shutil.which("docker")
    if docker is None:  # removed since the container was started
        raise BrokerError(
            "RabbitMQ runs in a container, but the command 'docker' is not installed; install "
            "Docker, and run this command again"
        )
    done = subprocess.run(
        [docker, "compose", "--project-name", project, "--file", compose, *arguments],
        env={
            **os.environ,
            "FLUFFLE_AMQP_PORT": str(info.ports.amqp),
            "FLUFFLE_MANAGEMENT_PORT": str(info.ports.management),
            "FLUFFLE_PROMETHEUS_PORT": str(info.ports.prometheus),
            "FLUFFLE_CONF": str(info.folder / "etc/container.conf"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise BrokerError(f"docker compose {arguments[0]} failed: {lines[-1]}")
    return done.stdout
