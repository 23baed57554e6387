"""Time to reach an accuracy with one slow worker, in synchronous and asynchronous runs.

    python -m benchmarks.asynchrony --json

Three fast workers and a slow one (``slow_digits``), a coordinator and a private RabbitMQ run as
separate processes, until the coordinator's test of a version reaches the target accuracy. The time
is from the opening of the first round to that version's commit. There are three jobs:

``synchronous``  ``--schedule quorum``, which waits for all workers.
``buffered``     ``--schedule buffered``.
``without``      A quorum of the fast workers, for as many versions as ``buffered`` had. It never
                 counts the slow worker and so shows what that worker's data contribute.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command, stats
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, ROOT, Died, Programs, machine, private_broker, scratch
from benchmarks.slow_digits import SLOW, WORKERS

_PATIENCE_S = 300.0
_MOST_VERSIONS = 500
_TASK = "benchmarks.slow_digits"


def job(folder: Path, url: str, options: argparse.Namespace, *arguments: object) -> dict[str, Any]:
    """Run one job.

    Args:
        folder: the folder to create for the run and the logs.
        url: the address of the broker.
        options: the options of the benchmark.
        arguments: the options of the coordinator that differ between jobs.
    """
    folder.mkdir()
    common = ("--federation", folder.name, "--url", url, "--log-format", "json")
    with Programs(folder) as programs:
        coordinator = programs.start(
            "coordinator", *FLUFFLE, "coordinator", *common, "--run", folder / "run",
            "--min-workers", WORKERS, "--rounds", _MOST_VERSIONS, "--learning-rate", 0.01,
            "--evaluate", f"{ROOT / 'benchmarks/slow_digits.py'}:test",
            "--monitor", "test/accuracy", "--target", options.target, *arguments,
        )  # fmt: skip
        for number in range(WORKERS):
            train_s = options.train_s * (options.slower if number == SLOW else 1)
            programs.start(
                f"w{number}", *FLUFFLE, "worker", *common, "--id", f"w{number}",
                "--task", f"{_TASK}:task", "--data", f"share={number},train_s={train_s:g}",
            )  # fmt: skip
        if coordinator.wait(_PATIENCE_S):
            raise Died(programs.log("coordinator").read_text()[-2000:])
        events, _ = read_events(programs.log("coordinator"), 0)
    opened = next(when for when, event in events if event["event"] == "opened")
    committed = max(when for when, event in events if event["event"] == "committed")
    test = [event["metrics"] for _, event in events if event["event"] == "tested"][-1]
    return {
        "seconds": round(committed - opened, 3),
        "test": {name: round(value, 4) for name, value in test.items()},
        **_history(folder / "run/history.jsonl"),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the three jobs and return their results."""
    before = machine()
    with scratch() as folder, private_broker(folder / "state") as broker:

        def timed(name: str, *arguments: object) -> dict[str, Any]:
            return job(folder / name, broker.url, options, *arguments)

        synchronous = timed("synchronous", "--quorum", "all")
        buffered = timed("buffered", "--schedule", "buffered", "--buffer", options.buffer)
        without = timed("without", "--quorum", SLOW, "--rounds", buffered["versions"])
    return {
        "workers": WORKERS,
        "slower": options.slower,
        "train_s": options.train_s,
        "buffer": options.buffer,
        "target": options.target,
        "synchronous": synchronous,
        "buffered": buffered,
        "without": without,
        "ratio": stats.ratio([buffered["seconds"]], [synchronous["seconds"]]),
        "machine": before,
    }


def _history(file: Path) -> dict[str, Any]:
    """Return from the history the number of updates, and the staleness of the slow worker's."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    commits = [line for line in lines if line["event"] == "committed"]
    slow = [
        participant
        for line in commits
        for participant in line["participants"]
        if participant["worker"] == f"w{SLOW}"
    ]
    staleness = Counter(participant.get("staleness", 0) for participant in slow)
    return {
        "versions": len(commits),
        "updates": sum(len(line["participants"]) for line in commits),
        "slow": {
            "counted": len(slow),
            "staleness": {str(age): count for age, count in sorted(staleness.items())},
            "mean_discount": round(
                statistics.fmean([participant.get("discount", 1.0) for participant in slow] or [0]),
                3,
            ),
        },
    }


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [
        [
            name,
            run["seconds"],
            run["versions"],
            run["updates"],
            f"{run['test']['accuracy']:.3f}",
            f"{run['test']['slow']:.3f}",
            run["slow"]["counted"],
            run["slow"]["mean_discount"],
        ]
        for name in ("synchronous", "buffered", "without")
        for run in [results[name]]
    ]
    head = [
        f"until accuracy {results['target']:g}",
        "seconds",
        "versions",
        "updates",
        "accuracy",
        "on 8 and 9",
        "slow updates",
        "mean discount",
    ]
    staleness = results["buffered"]["slow"]["staleness"]
    ages = ", ".join(f"{age}: {count}" for age, count in staleness.items())
    return (
        f"{command.table(head, rows)}\ntime of buffered over synchronous: {results['ratio']:.2f}\n"
        f"the slow worker's updates by staleness in versions: {ages}"
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("asynchrony", __doc__)
    parser.add_argument("--target", type=float, default=0.92, help="test accuracy to reach (0.92)")
    parser.add_argument(
        "--train-s", type=float, default=0.2, help="training time of a fast worker (0.2)"
    )
    parser.add_argument("--slower", type=float, default=10, help="factor for the slow worker (10)")
    parser.add_argument("--buffer", type=int, default=SLOW, help=f"updates per version ({SLOW})")
    options = parser.parse_args()
    command.show(measure(options), options, as_text)


if __name__ == "__main__":
    main()
