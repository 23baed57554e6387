"""All of fluffle's own benchmarks with small settings, a few minutes, and one table of them.

    python -m benchmarks            or        make bench

Each is also a program of its own, with more to set and more to tell: ``--help`` of ``rounds``,
``aggregate``, ``epoch``, ``letters_job`` and ``scale``. What is wanted of them is of a machine that
does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import figures
from benchmarks.processes import ROOT

Told = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One program, and what to show of what it finds.

    Args:
        words: its name and options.
        rows: ``what it found -> rows of (what, found, wanted)``.
    """

    words: str
    rows: Callable[[Told], list[list[Any]]]


def _rounds(wanted: float) -> Callable[[Told], list[list[Any]]]:
    def rows(told: Told) -> list[list[Any]]:
        size = f"{told['size_mb']:g} MB, {told['workers']} workers"
        peaks = told["fluffle"]["peak_rss_mb"]
        return [
            [f"{size}: round, s", told["fluffle"]["median_s"], None],
            ["  over the floor", told["ratio"], f"<= {wanted:g}"],
            ["  processor time over the floor's", told["cpu_ratio"], None],
            ["  peak of the coordinator, MB", peaks["coordinator"], None],
        ]

    return rows


def _aggregate(told: Told) -> list[list[Any]]:
    return [["fold and average over axpy", told["ratio"], "<= 1.5"]]


def _epoch(told: Told) -> list[list[Any]]:
    return [
        ["local fit over a bare loop", told["ratio"], "<= 1.1"],
        ["  worker's first sign of life, s", told["start_up"]["first_sign_s"], None],
    ]


def _letters(told: Told) -> list[list[Any]]:
    return [[f"letters job, cache {told['cache']}, s", told["median_s"], None]]


def _scale(told: Told) -> list[list[Any]]:
    rows = [
        [f"{one['workers']} workers, {told['size_mb']:g} MB: round, s", one["median_s"], None]
        for one in told["runs"]
    ]
    return [*rows, ["  growth over that of the workers", told["growth"], "<= 1"]]


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
    """Run them one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print all they found, by command")
    options = parser.parse_args()
    found: dict[str, Told] = {}
    for benchmark in BENCHMARKS:
        print(f"python -m benchmarks.{benchmark.words}", file=sys.stderr, flush=True)
        name, *words = benchmark.words.split()
        command = [sys.executable, "-m", f"benchmarks.{name}", *words, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(f"{benchmark.words} failed")
        found[benchmark.words] = json.loads(done.stdout)
    if options.json:
        print(json.dumps(found))
        return
    rows = [row for benchmark in BENCHMARKS for row in benchmark.rows(found[benchmark.words])]
    print(figures.table(["", "found", "wanted"], rows))


if __name__ == "__main__":
    main()
