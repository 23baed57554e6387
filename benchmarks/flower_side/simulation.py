"""A simulated job on Flower's simulation engine, which runs clients in processes of Ray.

python -m benchmarks.flower_side.simulation '{"job": "lr", "rounds": 100, "num_cpus": 1, …}'

The results have the names of those of ``benchmarks.simulation``.
"""

# ruff: noqa: E402 - the imports are part of what is measured

from __future__ import annotations

import time

_BEGAN_AT = time.perf_counter()

import json
import statistics
import sys

from flwr.simulation import run_simulation

from benchmarks import stats
from benchmarks.flower_side.simulated import client, server
from benchmarks.simulated_jobs import JOBS


def main() -> None:
    """Run the job that the command line describes."""
    config = json.loads(sys.argv[1])
    averaged: list[float] = []
    run_simulation(
        server_app=server(config["job"], config["rounds"], averaged),
        client_app=client,
        num_supernodes=JOBS[config["job"]].clients,
        backend_config={
            "init_args": {"_temp_dir": config["folder"]},
            "client_resources": {"num_cpus": config["num_cpus"]},
        },
    )
    results = {
        "seconds": round(time.perf_counter() - _BEGAN_AT, 3),
        "seconds_a_round": round(statistics.median(stats.gaps(averaged)), 4),
        "to_the_first_round_s": round(averaged[0] - _BEGAN_AT, 3),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
