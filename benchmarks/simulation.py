"""Time of whole simulations, including imports, compilation, tests and files.

    python -m benchmarks.simulation --job lr
    python -m benchmarks.simulation --job emnist --rounds 20 --json

``simulated_jobs`` describes the three jobs, ``lr``, ``emnist`` and ``noop``.

``seconds`` is the time since the start of this program, including its imports; ``seconds_a_round``
is the median time between commits.
"""

# ruff: noqa: E402 - the imports are part of what is measured

from __future__ import annotations

import time

_BEGAN_AT = time.perf_counter()

import statistics
from collections.abc import Mapping
from typing import Any

import fluffle
from benchmarks import command, stats
from benchmarks.processes import machine, scratch
from benchmarks.simulated_jobs import JOBS, Job


def run(job: Job, rounds: int) -> dict[str, Any]:
    """Simulate a job and return its times."""
    committed: list[float] = []

    def on_round(_: fluffle.Commit) -> None:
        committed.append(time.perf_counter())

    with scratch() as folder:
        done = fluffle.simulate(
            job.tasks(),
            clients=job.clients,
            fraction=job.fraction,
            batch_size=job.batch_size,
            test_every=job.test_every,
            rounds=rounds,
            folder=folder / "run",
            on_round=on_round,
            progress=False,
        )
        assert len(done.history) == rounds
    return {
        "seconds": round(time.perf_counter() - _BEGAN_AT, 3),
        "seconds_a_round": round(statistics.median(stats.gaps(committed)), 4),
        "to_the_first_round_s": round(committed[0] - _BEGAN_AT, 3),
        "cpu_s": round(time.process_time(), 3),
    }


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [
        [
            name,
            results[name],
            f"<= {results['targets'][name]:g}" if name in results["targets"] else None,
        ]
        for name in ("seconds", "seconds_a_round", "to_the_first_round_s", "cpu_s")
    ]
    return command.table([results["job"], "result", "target"], rows)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("simulation", __doc__)
    parser.add_argument("--job", choices=sorted(JOBS), default="lr", help="job (%(default)s)")
    parser.add_argument("--rounds", type=int, help="number of rounds; each job has its own default")
    options = parser.parse_args()
    job = JOBS[options.job]
    rounds = options.rounds or job.rounds
    results = {"job": options.job, "rounds": rounds, "targets": job.targets, **machine()}
    command.show(results | run(job, rounds), options, as_text)


if __name__ == "__main__":
    main()
