"""Time of the whole letters job, from the start of the processes to the saved model.

    python -m benchmarks.letters_job --repeats 3
    python -m benchmarks.letters_job --data ../letters/data --cache wiped --json

With the broker running, a coordinator and a worker per client start at once. ``saved_s`` is the
time until the last model is on disk, ``ended_s`` until the coordinator's process has ended.

Workers keep JAX's compilation cache in a folder. With ``--cache kept`` (the default), a first job,
which is not timed, has filled it, as in the second run on a machine. With ``wiped``, each job
starts with an empty cache, as in the first run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command, stats
from benchmarks.logs import read_events
from benchmarks.processes import FLUFFLE, Died, Programs, machine, private_broker, scratch

_PATIENCE_S = 600.0


def job(folder: Path, url: str, clients: list[Path], rounds: int, cache: Path) -> dict[str, Any]:
    """Run the job once.

    Args:
        folder: the folder to create for the run and the logs.
        url: the address of the broker.
        clients: the data folder of each client.
        rounds: the number of rounds.
        cache: the folder of the workers' compilation cache.
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
    saved = {
        event["round"]: when - began for when, event in events if event["event"] == "committed"
    }
    accuracies = [
        event["metrics"].get("accuracy") for _, event in events if event["event"] == "evaluated"
    ]
    return {
        "saved_s": round(saved[rounds], 3),
        "ended_s": round(ended, 3),
        "round_saved_s": [round(saved[number], 3) for number in sorted(saved)],
        "accuracy": accuracies[-1] if accuracies else None,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the job repeatedly and return the results."""
    jobs, before = [], machine()
    with scratch() as folder, private_broker(folder / "state") as broker:
        data = options.data
        if data is None:
            from fluffle_worker.letters.handwriting.drawing import draw_letters

            data = folder / "data"
            draw_letters(data, clients=options.clients, per_client=options.per_client, seed=1)
        # `fluffle letters` also draws writers who are not clients.
        clients = sorted(
            path.resolve()
            for path in data.iterdir()
            if path.is_dir() and not path.name.startswith(("writer-", "."))
        )
        kept = options.cache == "kept"
        for number in range(options.repeats + kept):
            cache = folder / ("cache" if kept else f"cache{number}")
            result = job(folder / f"job{number}", broker.url, clients, options.rounds, cache)
            if number or not kept:
                jobs.append(result)
    return {
        "clients": len(clients),
        "rounds": options.rounds,
        "cache": options.cache,
        **stats.summary([job["saved_s"] for job in jobs]),
        "jobs": jobs,
        "machine": before,
    }


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [
        [f"job {number}", job["saved_s"], job["ended_s"], job["round_saved_s"][0], job["accuracy"]]
        for number, job in enumerate(results["jobs"], start=1)
    ]
    head = [
        f"{results['clients']} clients, {results['rounds']} rounds, cache {results['cache']}",
        "model saved s",
        "ended s",
        "first round s",
        "accuracy",
    ]
    return f"{command.table(head, rows)}\nmedian {results['median_s']:.2f} s"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("letters_job", __doc__)
    parser.add_argument("--data", type=Path, help="a folder of clients (default: drawn letters)")
    parser.add_argument("--clients", type=int, default=3, help="number of clients to draw (3)")
    parser.add_argument("--per-client", type=int, default=250, help="letters per client (250)")
    parser.add_argument("--rounds", type=int, default=6, help="number of rounds (6)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions (3)")
    parser.add_argument("--cache", choices=["kept", "wiped"], default="kept", help="JAX's (kept)")
    options = parser.parse_args()
    command.show(measure(options), options, as_text)


if __name__ == "__main__":
    main()
