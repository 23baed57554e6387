"""Run the main benchmarks with small settings, in a few minutes, and print one table.

    python -m benchmarks            or        make bench

Each is also a command with more options and results: ``rounds``, ``aggregate``, ``epoch``,
``letters_job`` and ``scale``. The targets assume that the machine does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import command
from benchmarks.processes import ROOT

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        command: its name and options.
        rows: ``results -> rows of (quantity, result, target)``.
    """

    command: str
    rows: Callable[[Results], list[list[Any]]]


def _rounds(target: float) -> Callable[[Results], list[list[Any]]]:
    def rows(results: Results) -> list[list[Any]]:
        size = f"{results['size_mb']:g} MB, {results['workers']} workers"
        peaks = results["fluffle"]["peak_rss_mb"]
        return [
            [f"{size}: round, s", results["fluffle"]["median_s"], None],
            ["  over the floor", results["ratio"], f"<= {target:g}"],
            ["  processor time over the floor's", results["cpu_ratio"], None],
            ["  peak of the coordinator, MB", peaks["coordinator"], None],
        ]

    return rows


def _aggregate(results: Results) -> list[list[Any]]:
    return [["fold and average over axpy", results["ratio"], "<= 1.5"]]


def _epoch(results: Results) -> list[list[Any]]:
    return [
        ["local fit over a bare loop", results["ratio"], "<= 1.1"],
        ["  worker's first heartbeat, s", results["start_up"]["first_sign_s"], None],
    ]


def _letters(results: Results) -> list[list[Any]]:
    return [[f"letters job, cache {results['cache']}, s", results["median_s"], None]]


def _scale(results: Results) -> list[list[Any]]:
    rows = [
        [f"{run['workers']} workers, {results['size_mb']:g} MB: round, s", run["median_s"], None]
        for run in results["runs"]
    ]
    return [*rows, ["  growth over that of the workers", results["growth"], "<= 1"]]


BENCHMARKS = (
    Benchmark("rounds --size-mb 0.1", _rounds(1.3)),
    Benchmark("rounds --size-mb 1.36 --rounds 40", _rounds(1.25)),
    Benchmark("rounds --size-mb 10 --rounds 20", _rounds(1.25)),
    Benchmark("rounds --size-mb 100 --rounds 6 --blocks 3", _rounds(1.25)),
    Benchmark("aggregate --repeats 5", _aggregate),
    Benchmark("epoch --repeats 7 --start-up", _epoch),
    Benchmark("letters_job --repeats 2", _letters),
    Benchmark("scale --workers 3,10,30 --rounds 20", _scale),
)


def main() -> None:
    """Run all benchmarks and print their results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print all results as JSON, by command")
    options = parser.parse_args()
    all_results: dict[str, Results] = {}
    for benchmark in BENCHMARKS:
        command.report(f"python -m benchmarks.{benchmark.command}")
        name, *arguments = benchmark.command.split()
        child = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json"]
        process = subprocess.run(child, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        if process.returncode:
            raise SystemExit(f"{benchmark.command} failed")
        all_results[benchmark.command] = json.loads(process.stdout)
    if options.json:
        print(json.dumps(all_results))
        return
    rows = [
        row for benchmark in BENCHMARKS for row in benchmark.rows(all_results[benchmark.command])
    ]
    print(command.table(["", "result", "target"], rows))


if __name__ == "__main__":
    main()
