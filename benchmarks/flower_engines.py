"""Flower's two networked engines as sides of a comparison.

Both wait at the gate in the server, before it sends a round's work, so that no message is under way
and the clients only wait. A round lasts from one average to the next. Nothing is written to disk,
unlike in fluffle.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import stats
from benchmarks.comparison import WARM_UP
from benchmarks.processes import ROOT, Died, Programs
from benchmarks.round_gate import Gates
from fluffle_broker.node.network import free_ports

APP = ROOT / "benchmarks" / "flower_side" / "app"
_FOREVER = 10**6
_LATE_S = 60.0


def environment(home: Path) -> dict[str, str]:
    """Return an environment without telemetry or update checks, and with a private home folder."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "PATH": os.environ["PATH"],
    }


class _Gated(ABC):
    """The common part of both engines: a gate at the server, and its file of time stamps.

    Args:
        programs: starts the processes.
        python: the Python of Flower's environment.
        size_bytes: the size of the model.
        clients: the number of clients.
        evaluates: whether every client evaluates every round's model.
    """

    name: str
    warm_up: int  # rounds to run before measuring

    def __init__(
        self,
        programs: Programs,
        python: Path,
        *,
        size_bytes: int,
        clients: int,
        evaluates: bool = False,
    ) -> None:
        name = self.name.replace(" ", "-")
        self._gates = Gates(programs.folder / f"{name}.gate", 1, programs.check)
        programs.afterwards(self._gates.close)
        self._stamps = programs.folder / f"{name}.stamps"
        self._stamps.touch()
        self._seen = 0
        config = {
            "size": size_bytes,
            "clients": clients,
            "evaluates": int(evaluates),
            "rounds": _FOREVER,
            "gate": str(self._gates.path),
            "stamps": str(self._stamps),
        }
        self._pids = self._start(programs, python, config, [{}] * clients)
        self._gates.wait()
        self.block(self.warm_up)

    @abstractmethod
    def _start(
        self,
        programs: Programs,
        python: Path,
        config: dict[str, Any],
        clients: list[dict[str, Any]],
    ) -> dict[str, int]:
        """Start the processes and return their ids by name."""

    def block(self, rounds: int) -> list[float]:
        """Run rounds; see ``comparison.Side``."""
        self._gates.release(rounds + 1)
        self._gates.wait()
        latest = time.monotonic() + _LATE_S
        while len(lines := self._stamps.read_text().splitlines()) < self._seen + rounds + 1:
            if time.monotonic() > latest:
                raise Died(f"{self._stamps}: {len(lines) - self._seen} of {rounds + 1} rounds")
        moments = [float(line.split()[0]) for line in lines[self._seen :]]
        self._seen = len(lines)
        return stats.gaps(moments)

    def more(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}


class FlowerDirect(_Gated):
    """``start_server`` and ``start_client``, the deprecated and faster engine."""

    name = "flower direct"
    warm_up = WARM_UP

    def _start(self, *args: Any) -> dict[str, int]:
        return start_direct(*args)

    def pids(self) -> dict[str, int]:
        """Return the process ids by name."""
        return dict(self._pids)


def start_direct(
    programs: Programs, python: Path, config: Mapping[str, Any], clients: list[dict[str, Any]]
) -> dict[str, int]:
    """Start a server and its clients; return their process ids by name."""
    env = environment(programs.folder / "flower-home")
    port = free_ports(1)[0]
    address = f"127.0.0.1:{port}"
    module = (python, "-m", "benchmarks.flower_side.direct")
    config = {**config, "address": address}
    server = programs.start("flower-server", *module, "server", json.dumps(config), env=env)
    pids = {"coordinator": server.pid}
    if "size" in config:  # with a large model, its start takes longer than clients wait
        _until_listening(programs, port)
    for number, client in enumerate(clients, start=1):
        mine = {**config, "seed": number, **client}
        pids[f"worker {number}"] = programs.start(
            f"flower-client-{number}", *module, "client", json.dumps(mine), env=env
        ).pid
    return pids


class FlowerProduction(_Gated):
    """``flower-superlink``, ``flower-supernode`` for each client, and ``flwr run``."""

    name = "flower production"
    warm_up = 1

    def _start(self, *args: Any) -> dict[str, int]:
        return start_production(*args)

    def pids(self) -> dict[str, int]:
        """Return the ids of the lasting processes; each client app is a short-lived one."""
        server_app = self._stamps.read_text().splitlines()[-1].split()[1]
        return {**self._pids, "coordinator": int(server_app)}


def start_production(
    programs: Programs, python: Path, config: Mapping[str, Any], clients: list[dict[str, Any]]
) -> dict[str, int]:
    """Start a superlink, the supernodes and the run; return the process ids by name."""
    home = programs.folder / "flower-home"
    home.mkdir(exist_ok=True)
    commands = python.parent
    env = environment(home)
    env["PATH"] = f"{commands}:{env['PATH']}"
    port, *ports = free_ports(1 + len(clients))
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{address}"\n'
        "insecure = true\n"
    )
    flags = ("--insecure", "--host", "127.0.0.1")
    link = programs.start(
        "flower-superlink", commands / "flower-superlink", *flags, "--port", port,
        "--disable-runtime-dependency-installation", env=env,
    )  # fmt: skip
    pids = {"superlink": link.pid}
    _until_listening(programs, port)
    for number, (own, client) in enumerate(zip(ports, clients, strict=True), start=1):
        pids[f"worker {number}"] = programs.start(
            f"flower-supernode-{number}", commands / "flower-supernode", *flags, "--port", own,
            "--superlink", address, "--node-config", _toml({"seed": number, **client}), env=env,
        ).pid  # fmt: skip
    done = subprocess.run(
        [commands / "flwr", "run", APP, "bench", "--run-config", _toml(config)],
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Died(f"flwr run: {done.stdout}{done.stderr}")
    return pids


def _toml(config: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())


def _until_listening(programs: Programs, port: int) -> None:
    import socket

    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        programs.check()
        time.sleep(0.1)
