"""Flower's two networked engines as sides of a comparison.

Both are held back on the server's side, before a round's work goes out: then nothing is on its way,
and what their clients do is wait. A round lasts from one average to the next. Nothing is written to
disk, which fluffle does after every round.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.gate import Gates
from benchmarks.processes import ROOT, Died, Programs
from benchmarks.sides import WARM_UP
from fluffle_broker.node.network import free_ports

APP = ROOT / "benchmarks" / "flower_side" / "app"
_FOREVER = 10**6
_LATE_S = 60.0


def environment(home: Path) -> dict[str, str]:
    """Return what keeps Flower to itself: no telemetry, no look for updates, a home of its own."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "PATH": os.environ["PATH"],
    }


class _Gated:
    """What both engines have in common: a gate at the server, and its file of stamps.

    Args:
        programs: what starts its processes.
        python: that of Flower's environment.
        size_bytes: of the model.
        clients: how many.
        evaluates: whether every client evaluates every round's model.
    """

    name: str
    warm_up: int  # rounds that it runs first

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
        told = {
            "size": size_bytes,
            "clients": clients,
            "evaluates": int(evaluates),
            "rounds": _FOREVER,
            "gate": str(self._gates.path),
            "stamps": str(self._stamps),
        }
        self._pids = self._start(programs, python, told, [{}] * clients)
        self._gates.wait()
        self.block(self.warm_up)

    def _start(
        self, programs: Programs, python: Path, told: dict[str, Any], clients: list[dict[str, Any]]
    ) -> dict[str, int]:
        """Start its processes; return them by name."""
        raise NotImplementedError

    def block(self, rounds: int) -> list[float]:
        """See ``sides.Side``."""
        self._gates.release(rounds + 1)
        self._gates.wait()
        latest = time.monotonic() + _LATE_S
        while len(lines := self._stamps.read_text().splitlines()) < self._seen + rounds + 1:
            if time.monotonic() > latest:
                raise Died(f"{self._stamps}: {len(lines) - self._seen} of {rounds + 1} rounds")
        moments = [float(line.split()[0]) for line in lines[self._seen :]]
        self._seen = len(lines)
        return figures.gaps(moments)

    def more(self) -> dict[str, Any]:
        """See ``sides.Side``."""
        return {}


class FlowerDirect(_Gated):
    """``start_server`` and ``start_client``: deprecated, and the quicker of the two."""

    name = "flower direct"
    warm_up = WARM_UP

    def _start(self, *what: Any) -> dict[str, int]:
        return start_direct(*what)

    def pids(self) -> dict[str, int]:
        """See ``sides.Side``."""
        return dict(self._pids)


def start_direct(
    programs: Programs, python: Path, told: Mapping[str, Any], clients: list[dict[str, Any]]
) -> dict[str, int]:
    """Start a server and its clients; return their processes by name."""
    env = environment(programs.folder / "flower-home")
    port = free_ports(1)[0]
    address = f"127.0.0.1:{port}"
    module = (python, "-m", "benchmarks.flower_side.direct")
    told = {**told, "address": address}
    server = programs.start("flower-server", *module, "server", json.dumps(told), env=env)
    pids = {"coordinator": server.pid}
    if "size" in told:  # a large model takes it longer to begin than clients wait for a server
        _until_listening(programs, port)
    for number, client in enumerate(clients, start=1):
        mine = {**told, "seed": number, **client}
        pids[f"worker {number}"] = programs.start(
            f"flower-client-{number}", *module, "client", json.dumps(mine), env=env
        ).pid
    return pids


class FlowerProduction(_Gated):
    """``flower-superlink``, ``flower-supernode`` for each client, and ``flwr run``."""

    name = "flower production"
    warm_up = 1

    def _start(self, *what: Any) -> dict[str, int]:
        return start_production(*what)

    def pids(self) -> dict[str, int]:
        """See ``sides.Side``: those that last; each client app is a process that ends."""
        server_app = self._stamps.read_text().splitlines()[-1].split()[1]
        return {**self._pids, "coordinator": int(server_app)}


def start_production(
    programs: Programs, python: Path, told: Mapping[str, Any], clients: list[dict[str, Any]]
) -> dict[str, int]:
    """Start a superlink, supernodes, and the run; return the processes by name."""
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
        [commands / "flwr", "run", APP, "bench", "--run-config", _toml(told)],
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Died(f"flwr run: {done.stdout}{done.stderr}")
    return pids


def _toml(told: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={json.dumps(value)}" for name, value in told.items())


def _until_listening(programs: Programs, port: int) -> None:
    import socket

    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        programs.check()
        time.sleep(0.1)
