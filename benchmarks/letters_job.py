"""The whole letters job, from the start of the processes to the saved model.

    python -m benchmarks.letters_job --repeats 3
    python -m benchmarks.letters_job --data ../letters/data --cache wiped --json

A coordinator and a worker for each client are started at once, the broker being up already, and the
job is over when the last round's model is on disk; ``ended_s`` is when the coordinator's process is
gone. Workers keep what JAX compiles in a cache folder. ``--cache kept`` (the default) uses one that
a first job, which is not timed, has filled: the second run on a machine. ``wiped`` gives every job
an empty one: the first run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command, figures
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, Died, Programs, machine, private_broker, scratch

_PATIENCE_S = 600.0


def job(folder: Path, url: str, clients: list[Path], rounds: int, cache: Path) -> dict[str, Any]:
    """Run the job once.

    Args:
        folder: made here; for the run and the logs.
        url: the broker.
        clients: the data of each.
        rounds: how many.
        cache: where the workers keep what they compile.
    """
    folder.mkdir()
    with Programs(folder, {"XDG_CACHE_HOME": str(cache)}) as programs:
        common = ("--federation", folder.name, "--url", url, "--log-format", "json")
        began = time.time()
        coordinator = programs.start(
            "coordinator", *FLUFFLE, "coordinator", *common, "--run", folder / "run",
            "--rounds", rounds, "--quorum", len(clients),
        )  # fmt: skip
        for data in clients:
            programs.start(data.name, *FLUFFLE, "worker", *common, "--data", data)
        code = coordinator.wait(_PATIENCE_S)
        ended = time.time() - began
        if code or not (folder / "run" / f"round-{rounds:04d}.safetensors").exists():
            raise Died(programs.log("coordinator").read_text()[-2000:])
        events, _ = read_events(programs.log("coordinator"), 0)
    saved = {told["round"]: when - began for when, told in events if told["event"] == "committed"}
    seen = [told["metrics"].get("accuracy") for _, told in events if told["event"] == "evaluated"]
    return {
        "saved_s": round(saved[rounds], 3),
        "ended_s": round(ended, 3),
        "round_saved_s": [round(saved[number], 3) for number in sorted(saved)],
        "accuracy": seen[-1] if seen else None,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the job as often as asked."""
    found, before = [], machine()
    with scratch() as folder, private_broker(folder / "state") as broker:
        data = options.data
        if data is None:
            from fluffle_worker.letters.handwriting.drawing import draw_letters

            data = folder / "data"
            draw_letters(data, clients=options.clients, per_client=options.per_client, seed=1)
        # `fluffle letters` also draws writers who are no clients.
        clients = sorted(
            path.resolve()
            for path in data.iterdir()
            if path.is_dir() and not path.name.startswith(("writer-", "."))
        )
        kept = options.cache == "kept"
        for number in range(options.repeats + kept):
            cache = folder / ("cache" if kept else f"cache{number}")
            told = job(folder / f"job{number}", broker.url, clients, options.rounds, cache)
            if number or not kept:
                found.append(told)
    return {
        "clients": len(clients),
        "rounds": options.rounds,
        "cache": options.cache,
        **figures.summary([told["saved_s"] for told in found]),
        "jobs": found,
        "machine": before,
    }


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    rows = [
        [f"job {number}", one["saved_s"], one["ended_s"], one["round_saved_s"][0], one["accuracy"]]
        for number, one in enumerate(told["jobs"], start=1)
    ]
    head = [
        f"{told['clients']} clients, {told['rounds']} rounds, cache {told['cache']}",
        "model saved s",
        "ended s",
        "first round s",
        "accuracy",
    ]
    return f"{figures.table(head, rows)}\nmedian {told['median_s']:.2f} s"


def main() -> None:
    """Measure, and print."""
    parser = command.parser("letters_job", __doc__)
    parser.add_argument("--data", type=Path, help="a folder of clients (default: drawn letters)")
    parser.add_argument("--clients", type=int, default=3, help="clients, of drawn letters (3)")
    parser.add_argument("--per-client", type=int, default=250, help="letters of each (250)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds (6)")
    parser.add_argument("--repeats", type=int, default=3, help="how often (3)")
    parser.add_argument("--cache", choices=["kept", "wiped"], default="kept", help="JAX's cache")
    options = parser.parse_args()
    told = measure(options)
    command.show(told, options, as_text)


if __name__ == "__main__":
    main()
