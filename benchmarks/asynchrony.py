"""Time to an accuracy with one worker that is ten times slower: synchronous and asynchronous.

    python -m benchmarks.asynchrony --json

Three quick workers and a slow one (``slow_digits``), each a process, a coordinator, and a RabbitMQ
of their own. The same job runs with ``--schedule quorum``, which waits for all, and with
``--schedule buffered``, until the coordinator's own test of a version is as good as the target. The
time is from the opening of the first round to that version's commit. ``without`` is a third one,
with a quorum of the quick ones: what the slow one's data are worth. It never counts them, and ends
after as many versions as the asynchronous one had.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command, figures
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, ROOT, Died, Programs, machine, private_broker, scratch
from benchmarks.slow_digits import SLOW, WORKERS

_PATIENCE_S = 300.0
_MOST_VERSIONS = 500
_TASK = "benchmarks.slow_digits"


def job(folder: Path, url: str, options: argparse.Namespace, *words: object) -> dict[str, Any]:
    """Run the job once.

    Args:
        folder: made here; for the run and the logs.
        url: the broker.
        options: of the benchmark.
        words: the coordinator's options that differ.
    """
    folder.mkdir()
    common = ("--federation", folder.name, "--url", url, "--log-format", "json")
    with Programs(folder) as programs:
        coordinator = programs.start(
            "coordinator", *FLUFFLE, "coordinator", *common, "--run", folder / "run",
            "--min-workers", WORKERS, "--rounds", _MOST_VERSIONS, "--learning-rate", 0.01,
            "--evaluate", f"{ROOT / 'benchmarks/slow_digits.py'}:test",
            "--monitor", "test/accuracy", "--target", options.target, *words,
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
    opened = next(when for when, told in events if told["event"] == "opened")
    committed = max(when for when, told in events if told["event"] == "committed")
    test = [told["metrics"] for _, told in events if told["event"] == "tested"][-1]
    return {
        "seconds": round(committed - opened, 3),
        "test": {name: round(found, 4) for name, found in test.items()},
        **_history(folder / "run/history.jsonl"),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the three jobs."""
    before = machine()
    with scratch() as folder, private_broker(folder / "state") as broker:

        def timed(name: str, *words: object) -> dict[str, Any]:
            return job(folder / name, broker.url, options, *words)

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
        "ratio": figures.ratio([buffered["seconds"]], [synchronous["seconds"]]),
        "machine": before,
    }


def _history(file: Path) -> dict[str, Any]:
    """Read from the history how good the last version is, and how the slow worker counted."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    commits = [line for line in lines if line["event"] == "committed"]
    slow = [one for line in commits for one in line["participants"] if one["worker"] == f"w{SLOW}"]
    staleness = Counter(one.get("staleness", 0) for one in slow)
    return {
        "versions": len(commits),
        "updates": sum(len(line["participants"]) for line in commits),
        "slow": {
            "counted": len(slow),
            "staleness": {str(one): times for one, times in sorted(staleness.items())},
            "mean_discount": round(
                statistics.fmean([one.get("discount", 1.0) for one in slow] or [0]), 3
            ),
        },
    }


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    rows = [
        [
            name,
            one["seconds"],
            one["versions"],
            one["updates"],
            f"{one['test']['accuracy']:.3f}",
            f"{one['test']['slow']:.3f}",
            one["slow"]["counted"],
            one["slow"]["mean_discount"],
        ]
        for name in ("synchronous", "buffered", "without")
        for one in [told[name]]
    ]
    head = [
        f"to an accuracy of {told['target']:g}",
        "seconds",
        "versions",
        "updates",
        "accuracy",
        "of 8 and 9",
        "slow one counted",
        "its mean discount",
    ]
    old = ", ".join(f"{s}: {n}" for s, n in told["buffered"]["slow"]["staleness"].items())
    return (
        f"{figures.table(head, rows)}\nbuffered over synchronous: {told['ratio']:.2f}\n"
        f"how many versions old the slow one's updates were, and how often: {old}"
    )


def main() -> None:
    """Measure, and print."""
    parser = command.parser("asynchrony", __doc__)
    parser.add_argument("--target", type=float, default=0.92, help="accuracy of the test (0.92)")
    parser.add_argument("--train-s", type=float, default=0.2, help="of a quick worker (0.2)")
    parser.add_argument("--slower", type=float, default=10, help="how much the slow one is (10)")
    parser.add_argument("--buffer", type=int, default=SLOW, help=f"updates a version ({SLOW})")
    options = parser.parse_args()
    command.show(measure(options), options, as_text)


if __name__ == "__main__":
    main()
