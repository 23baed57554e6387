"""Whole simulated jobs on fluffle and on Flower's simulation engine, in turns; part of ``flower``.

Flower's engine, ``run_simulation`` with a ``ServerApp`` and a ``ClientApp``, runs clients in
processes of Ray. Their number is that of the machine's cores divided by ``--num-cpus``; by default,
each job has the one of 2, 1 and 0.5 with which it takes least time on two cores.

Both run the jobs of ``simulated_jobs``: the same number of clients, data, initial weights, batches,
rounds and tests, and FedAvg. Both train with fluffle's ``flax_task`` and a filled compilation
cache, so that only the engines differ. Only fluffle writes every round's model to disk.

``seconds`` is the time from the start of a job's process to its end, with imports, compilation and
tests. ``seconds_a_round`` is the median time from one average (with fluffle, commit) to the next.
The first job of each side is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command, stats
from benchmarks.flower_engines import environment
from benchmarks.processes import ROOT, Died, scratch
from benchmarks.simulated_jobs import JOBS

# Each process takes seconds to start, so more of them than cores pay only for many trainings.
FASTEST_NUM_CPUS = {"lr": 1.0, "emnist": 0.5, "noop": 1.0}
FLUFFLE, FLOWER = "fluffle", "flower"
_TIMES = ("seconds", "seconds_a_round", "to_the_first_round_s")
_MOST_S = 1800.0


def num_cpus(options: argparse.Namespace, name: str) -> float:
    """Return Flower's ``num_cpus`` of a client in a job."""
    return options.num_cpus or FASTEST_NUM_CPUS[name]


def command_of(
    engine: str, options: argparse.Namespace, name: str, folder: Path
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a job on an engine, and its environment.

    Args:
        engine: ``fluffle`` or ``flower``.
        options: the options of this benchmark.
        name: the job.
        folder: a folder for the engine's files and the compilation cache.
    """
    rounds = options.rounds or JOBS[name].rounds
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    if engine == FLUFFLE:
        job = ["benchmarks.simulation", "--job", name, "--rounds", str(rounds), "--json"]
        return [sys.executable, "-m", *job], env
    config = {"job": name, "rounds": rounds, "num_cpus": num_cpus(options, name)}
    config["folder"] = str(folder / "ray")
    path = ":".join(str(ROOT / side) for side in ("", "common", "worker"))
    env |= environment(folder / "flower-home")
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}
    module = "benchmarks.flower_side.simulation"
    return [str(options.python), "-m", module, json.dumps(config)], env


def timed(command_line: list[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Run a job, and return the times of ``_TIMES``.

    Raises:
        Died: if it failed.
    """
    began = time.monotonic()
    done = subprocess.run(
        command_line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=_MOST_S,
        check=False,
    )  # fmt: skip
    seconds = round(time.monotonic() - began, 3)
    if done.returncode:
        raise Died(f"{' '.join(command_line)}: {done.stderr[-4000:]}")
    results = json.loads(done.stdout.splitlines()[-1])
    return {**{name: results[name] for name in _TIMES}, "seconds": seconds}


def simulations(options: argparse.Namespace) -> dict[str, Any]:
    """Run the jobs, each on both engines in turn, and return the results."""
    return {"jobs": [_side_by_side(options, name) for name in options.job]}


def _side_by_side(options: argparse.Namespace, name: str) -> dict[str, Any]:
    engines = [FLUFFLE, FLOWER]
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with scratch(options.folder) as folder:
        for number, (engine, _) in enumerate(
            stats.interleaved(engines, [1] * (options.repeats + 1))
        ):
            found = timed(*command_of(engine, options, name, folder))
            command.report(f"{name}, {engine}: {found}")
            if number >= len(engines):
                runs[engine].append(found)
    medians = {
        engine: {
            what: round(statistics.median(run[what] for run in runs[engine]), 4) for what in _TIMES
        }
        for engine in engines
    }
    return {
        "job": name,
        "rounds": options.rounds or JOBS[name].rounds,
        "num_cpus": num_cpus(options, name),
        "over_flower": ratios(medians[FLUFFLE], medians[FLOWER]),
        "medians": medians,
        "runs": runs,
    }


def ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Return the ratio of each time.

    >>> ratios({"seconds": 1.0}, {"seconds": 4.0})
    {'seconds': 0.25}
    """
    return {what: round(ours[what] / theirs[what], 3) for what in ours}


def simulations_as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [
        [
            f"{run['job']}, {run['rounds']} rounds: {what}",
            run["medians"][FLUFFLE][what],
            run["medians"][FLOWER][what],
            run["over_flower"][what],
        ]
        for run in results["jobs"]
        for what in _TIMES
    ]
    return command.table(["median", FLUFFLE, FLOWER, "ratio"], rows)
