"""Many workers: how a round's time, the connections and the coordinator's memory grow with them.

    python -m benchmarks.scale --workers 10,30,100 --size-mb 1.36
    python -m benchmarks.scale --workers 100,1000 --size-mb 0.1 --processes 4

The workers are real ones, with a no-op task, many to a process (see ``crowd``); they connect one
after the other. Each number of workers has a run of its own on the same broker. Connections
and queues are those that the broker's management API counts during the run. ``growth`` tells by how
much more than in proportion to the workers a round's time has grown from the first number to the
last: where it is above 1, the exit code is 1 with ``--check``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command, figures
from benchmarks.crowd import Crowd
from benchmarks.logs import read_events
from benchmarks.processes import (
    FLUFFLE,
    Programs,
    allow_files,
    cpu_s,
    machine,
    peak_bytes,
    private_broker,
    scratch,
)
from fluffle_broker.node.record import NodeInfo
from fluffle_common.transport.rabbitmq.management import ask

WARM_UP = 2
_LOOK_S = 0.2
_SPARE_FILES = 200
_CONNECTIONS = 2  # of a worker
_OF_COORDINATOR = ("coordinator_cpu_s_a_round", "coordinator_peak_mb")
_SLACK = 1.1  # what a shared machine may add to a growth in proportion


def crowds(url: str, federation: str, options: argparse.Namespace, workers: int) -> list[Crowd]:
    """Share the workers out to processes; all of these together start ``ramp`` workers a second."""
    number = min(options.processes, workers)
    sizes = figures.shares(workers, number)
    starts = [1 + sum(sizes[:at]) for at in range(number)]
    return [
        Crowd(
            url,
            federation,
            first=start,
            last=start + size - 1,
            size_bytes=round(options.size_mb * 1e6),
            pause_s=number / options.ramp,
        )
        for start, size in zip(starts, sizes, strict=True)
    ]


def run(
    broker: NodeInfo, folder: Path, options: argparse.Namespace, workers: int
) -> dict[str, Any]:
    """Run one federation to its end and return what was seen of it."""
    folder.mkdir()
    federation = f"scale{workers}"
    with Programs(folder) as programs:
        coordinator = programs.start(
            "coordinator", *FLUFFLE, "coordinator", "--federation", federation,
            "--url", broker.url, "--run", folder / "run", "--log-format", "json",
            "--rounds", 10**6, "--quorum", workers, "--deadline", options.limit,
        )  # fmt: skip
        for crowd in crowds(broker.url, federation, options, workers):
            programs.start(
                f"crowd-{crowd.first}", sys.executable, "-m", "benchmarks.crowd", crowd.json()
            )
        seen = _watch(programs, broker, Watched(federation, workers, coordinator.pid), options)
    times = figures.gaps(seen["committed"])[WARM_UP - 1 :][: options.rounds]
    return {
        "workers": workers,
        **figures.summary(times),
        "joined_s": round(seen["joined_s"], 2),
        "connections": seen["connections"],
        "queues": seen["queues"],
        "coordinator_peak_mb": round((seen["peak"] or 0) / 1e6, 1),
        "coordinator_cpu_s_a_round": round(seen["cpu_s"] / len(seen["committed"]), 4),
        "trouble": seen["trouble"],
    }


@dataclass(frozen=True)
class Watched:
    """A run to follow: its name, how many workers it has, the coordinator's process."""

    federation: str
    workers: int
    pid: int


def _watch(
    programs: Programs, broker: NodeInfo, run: Watched, options: argparse.Namespace
) -> dict[str, Any]:
    """Follow a run until enough is known of it: its rounds, and what the broker counts."""
    log, offset = programs.log("coordinator"), 0
    began, latest = time.time(), time.monotonic() + options.limit
    seen: dict[str, Any] = {"committed": [], "joined_s": 0.0, "connections": 0, "queues": 0}
    seen["trouble"] = []
    enough = options.rounds + WARM_UP
    # The broker's own figures are some seconds old, and a short run is over before that.
    while len(seen["committed"]) < enough or seen["connections"] < _CONNECTIONS * run.workers:
        if time.monotonic() > latest:
            raise TimeoutError(f"{len(seen['committed'])} rounds in {options.limit:.0f} s")
        programs.check()
        if seen["connections"] < _CONNECTIONS * run.workers:  # to count is work for the broker
            connections, queues = counts(broker, run.federation)
            seen["connections"] = max(seen["connections"], connections)
            seen["queues"] = max(seen["queues"], queues)
        events, offset = read_events(log, offset)
        for when, told in events:
            what = told["event"]
            if what == "committed":
                seen["committed"].append(when)
            elif what == "joined":
                seen["joined_s"] = when - began
            elif what in ("gone", "rejected", "failure", "disconnected", "reopened", "resend"):
                seen["trouble"].append(f"{what}: {told.get('reason') or told.get('worker')}")
        time.sleep(_LOOK_S)
    seen["peak"], seen["cpu_s"] = peak_bytes(run.pid), cpu_s(run.pid)
    for crowd in programs.folder.glob("crowd-*.log"):
        seen["trouble"] += crowd.read_text().splitlines()
    seen["trouble"] = seen["trouble"][:20]
    return seen


def counts(broker: NodeInfo, federation: str) -> tuple[int, int]:
    """Return how many connections there are, and queues of a federation, as the broker tells."""
    base = broker.management_url.rstrip("/")
    try:
        connections = ask(base, "/api/overview", broker.url)["object_totals"]["connections"]
        queues = ask(base, "/api/queues?columns=name&disable_stats=true", broker.url)
    except (OSError, ValueError, KeyError):
        return 0, 0
    return int(connections), sum(q["name"].startswith(f"{federation}.") for q in queues)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every number of workers."""
    before = machine()
    largest = max(options.workers)
    allow_files(_CONNECTIONS * 2 * largest + _SPARE_FILES)  # the broker has a file a connection
    found = []
    with scratch() as folder, private_broker(folder / "state") as broker:
        for workers in options.workers:
            found.append(run(broker, folder / f"scale{workers}", options, workers))
            print(f"{workers} workers: {found[-1]['median_s']} s", file=sys.stderr, flush=True)
        broker_peak = peak_bytes(broker.pid) if broker.pid else None
    return {
        "size_mb": options.size_mb,
        "rounds": options.rounds,
        "growth": round(figures.growth(options.workers, [one["median_s"] for one in found]), 3),
        "runs": found,
        "broker_peak_mb": round((broker_peak or 0) / 1e6, 1),
        "machine": before,
    }


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    names = ("median_s", "joined_s", "connections", "queues", *_OF_COORDINATOR)
    rows = [[f"{one['workers']} workers", *(one[name] for name in names)] for one in told["runs"]]
    lines = [figures.table([f"{told['size_mb']:g} MB", *names], rows)]
    lines.append(f"growth {told['growth']:.2f} of proportional; broker {told['broker_peak_mb']} MB")
    trouble = [text for one in told["runs"] for text in one["trouble"]]
    return "\n".join([*lines, *trouble])


def main() -> None:
    """Measure, and print."""
    parser = command.parser("scale", __doc__)
    parser.add_argument(
        "--workers",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[3, 10, 30],
        help="numbers of workers, growing (3,10,30)",
    )
    parser.add_argument("--size-mb", type=float, default=1.36, help="size of the model (1.36)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count (8)")
    parser.add_argument("--processes", type=int, default=2, help="processes of workers (2)")
    parser.add_argument("--ramp", type=float, default=50.0, help="workers started a second (50)")
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds of a run (900)")
    parser.add_argument("--check", action="store_true", help="fail where growth is above 1")
    options = parser.parse_args()
    told = measure(options)
    command.show(told, options, as_text)
    if options.check and told["growth"] > _SLACK:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
