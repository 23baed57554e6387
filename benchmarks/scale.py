"""Growth of a round's time, the connections and the coordinator's memory with the workers.

    python -m benchmarks.scale --workers 10,30,100 --size-mb 1.36
    python -m benchmarks.scale --workers 100,1000 --size-mb 0.1 --processes 4

The workers are real ones with a no-op task, many per process (see ``worker_crowd``); they connect
one by one. Each number of workers has its own run on the same broker. Connections and queues are
counted by the broker's management API during the run. ``growth`` is the growth of a round's time
from the first to the last number of workers, divided by the growth of that number. With
``--check``, the exit code is 1 if it is above 1.1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command, stats
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
from benchmarks.worker_crowd import Crowd
from fluffle_broker.node.record import NodeInfo
from fluffle_common.transport.rabbitmq.management import Management

WARM_UP = 2
_LOOK_S = 0.2
_SPARE_FILES = 200
_CONNECTIONS = 2  # per worker
_OF_COORDINATOR = ("coordinator_cpu_s_a_round", "coordinator_peak_mb")
_SLACK = 1.1  # tolerance for other load on the machine


def crowds(url: str, federation: str, options: argparse.Namespace, workers: int) -> list[Crowd]:
    """Distribute the workers over processes, which together start ``ramp`` workers a second."""
    number = min(options.processes, workers)
    sizes = stats.shares(workers, number)
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
    """Run one federation and return its results."""
    folder.mkdir()
    federation = f"scale{workers}"
    with Programs(folder) as programs:
        coordinator = programs.start(
            "coordinator", *FLUFFLE, "coordinator", "--federation", federation,
            "--url", broker.url, "--run", folder / "run", "--log-format", "json",
            "--rounds", 10**6, "--quorum", workers, "--deadline", options.limit,
        )  # fmt: skip
        for crowd in crowds(broker.url, federation, options, workers):
            command_line = sys.executable, "-m", "benchmarks.worker_crowd", crowd.json()
            programs.start(f"crowd-{crowd.first}", *command_line)
        seen = _watch(programs, broker, Watched(federation, workers, coordinator.pid), options)
    times = stats.gaps(seen["committed"])[WARM_UP - 1 :][: options.rounds]
    return {
        "workers": workers,
        **stats.summary(times),
        "joined_s": round(seen["joined_s"], 2),
        "connections": seen["connections"],
        "queues": seen["queues"],
        "coordinator_peak_mb": round((seen["peak"] or 0) / 1e6, 1),
        "coordinator_cpu_s_a_round": round(seen["cpu_s"] / len(seen["committed"]), 4),
        "trouble": seen["trouble"],
    }


@dataclass(frozen=True)
class Watched:
    """A run to watch: its federation, number of workers and coordinator's process id."""

    federation: str
    workers: int
    pid: int


def _watch(
    programs: Programs, broker: NodeInfo, run: Watched, options: argparse.Namespace
) -> dict[str, Any]:
    """Watch a run until enough rounds are committed and the broker has counted all connections."""
    log, offset = programs.log("coordinator"), 0
    began, latest = time.time(), time.monotonic() + options.limit
    seen: dict[str, Any] = {"committed": [], "joined_s": 0.0, "connections": 0, "queues": 0}
    seen["trouble"] = []
    enough = options.rounds + WARM_UP
    # The broker's counts lag by some seconds, so a short run has to be prolonged.
    while len(seen["committed"]) < enough or seen["connections"] < _CONNECTIONS * run.workers:
        if time.monotonic() > latest:
            raise TimeoutError(f"{len(seen['committed'])} rounds in {options.limit:.0f} s")
        programs.check()
        if seen["connections"] < _CONNECTIONS * run.workers:  # counting costs the broker time
            connections, queues = counts(broker, run.federation)
            seen["connections"] = max(seen["connections"], connections)
            seen["queues"] = max(seen["queues"], queues)
        events, offset = read_events(log, offset)
        for when, event in events:
            what = event["event"]
            if what == "committed":
                seen["committed"].append(when)
            elif what == "joined":
                seen["joined_s"] = when - began
            elif what in ("gone", "rejected", "failure", "disconnected", "reopened", "resend"):
                seen["trouble"].append(f"{what}: {event.get('reason') or event.get('worker')}")
        time.sleep(_LOOK_S)
    seen["peak"], seen["cpu_s"] = peak_bytes(run.pid), cpu_s(run.pid)
    for crowd in programs.folder.glob("crowd-*.log"):
        seen["trouble"] += crowd.read_text().splitlines()
    seen["trouble"] = seen["trouble"][:20]
    return seen


def counts(broker: NodeInfo, federation: str) -> tuple[int, int]:
    """Return the broker's counts of all connections and of a federation's queues."""
    api = Management(broker.url, broker.management_url)
    try:
        connections = api.ask("/api/overview")["object_totals"]["connections"]
        queues = api.ask("/api/queues?columns=name&disable_stats=true")
    except (OSError, ValueError, KeyError):
        return 0, 0
    return int(connections), sum(q["name"].startswith(f"{federation}.") for q in queues)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run a federation for each number of workers and return the results."""
    before = machine()
    largest = max(options.workers)
    allow_files(_CONNECTIONS * 2 * largest + _SPARE_FILES)  # one per connection at each end
    runs = []
    with scratch() as folder, private_broker(folder / "state") as broker:
        for workers in options.workers:
            runs.append(run(broker, folder / f"scale{workers}", options, workers))
            command.report(f"{workers} workers: {runs[-1]['median_s']} s")
        broker_peak = peak_bytes(broker.pid) if broker.pid else None
    return {
        "size_mb": options.size_mb,
        "rounds": options.rounds,
        "growth": round(stats.growth(options.workers, [each["median_s"] for each in runs]), 3),
        "runs": runs,
        "broker_peak_mb": round((broker_peak or 0) / 1e6, 1),
        "machine": before,
    }


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    names = ("median_s", "joined_s", "connections", "queues", *_OF_COORDINATOR)
    rows = [
        [f"{run['workers']} workers", *(run[name] for name in names)] for run in results["runs"]
    ]
    lines = [command.table([f"{results['size_mb']:g} MB", *names], rows)]
    lines.append(
        f"growth {results['growth']:.2f} of proportional; broker {results['broker_peak_mb']} MB"
    )
    trouble = [text for run in results["runs"] for text in run["trouble"]]
    return "\n".join([*lines, *trouble])


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("scale", __doc__)
    parser.add_argument(
        "--workers", type=command.listed(int), default=[3, 10, 30], help="growing (3,10,30)"
    )
    parser.add_argument("--size-mb", type=float, default=1.36, help="size of the model (1.36)")
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds (8)")
    parser.add_argument("--processes", type=int, default=2, help="processes of workers (2)")
    parser.add_argument("--ramp", type=float, default=50.0, help="workers started per second (50)")
    parser.add_argument("--limit", type=float, default=900.0, help="maximum seconds per run (900)")
    parser.add_argument("--check", action="store_true", help="fail if growth is above 1.1")
    options = parser.parse_args()
    results = measure(options)
    command.show(results, options, as_text)
    if options.check and results["growth"] > _SLACK:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
