"""Peak memory and time of a round's aggregation for each strategy, relative to FedAvg.

    python -m benchmarks.strategy_memory --size-mb 100 --updates 30 --json

Each strategy runs in its own process and does what a round does: updates arrive one at a time, as
views of a payload; each is checked, written to disk if the mean needs all updates at once, and
folded; then the round is closed. The updates are random. ``peak_mb`` is the peak resident memory of
the process, including mapped files, minus its memory before the model was created.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.arrays import make_weights
from benchmarks.processes import ROOT, scratch
from fluffle_common.tensors.layout import Layout, Tensors, layout_for
from fluffle_common.tensors.on_disk import map_to_disk
from fluffle_common.tensors.weights import check_delta
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.names import named_strategy

_REFERENCE = "fedavg"
_STRATEGIES = (_REFERENCE, "median", "trimmed:0.2", "krum:f=2", "rfa", "clip:1+median", "fedadam")


def _memory_mb(line: str) -> float:
    """Return this process's ``VmRSS`` (resident memory) or ``VmHWM`` (its peak) in megabytes."""
    (kilobytes,) = re.findall(rf"{line}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024 / 1e6


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _random_update(layout: Layout, numbers: np.random.Generator) -> Tensors:
    delta = layout.over(memoryview(bytearray(layout.nbytes)))
    for tensor in delta.values():
        numbers.standard_normal(out=tensor, dtype=tensor.dtype)
    return delta


def one_round(name: str, size_mb: float, updates: int, folder: Path) -> dict[str, float]:
    """Run one round in this process and return its peak memory and times."""
    strategy = named_strategy(name).strategy
    numbers = np.random.default_rng(0)
    before = _memory_mb("VmRSS")
    weights = make_weights(round(size_mb * 1e6))
    _reset_peak()  # excludes the generation of random weights
    layout = layout_for(weights)
    state = strategy.init(weights)
    fold_s = 0.0
    for place in range(updates):
        delta = _random_update(layout, numbers)
        began = time.perf_counter()
        check_delta(delta, weights)
        contribution = Contribution(
            worker=f"w{place:03d}",
            num_examples=100 + place,
            delta=delta,
            lay_on_disk=lambda tensors: map_to_disk(tensors, folder),
        )
        state = strategy.fold(state, contribution)
        fold_s += time.perf_counter() - began
        del delta, contribution  # before the next one is created
    began = time.perf_counter()
    strategy.finish(state, weights)
    finish_s = time.perf_counter() - began
    return {
        "peak_mb": round(_memory_mb("VmHWM") - before, 1),
        "fold_s": round(fold_s, 3),
        "finish_s": round(finish_s, 3),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run each strategy in a child process and compare its peak with FedAvg's."""
    by_strategy: dict[str, dict[str, float]] = {}
    for name in options.strategies:
        arguments = ["--size-mb", str(options.size_mb), "--updates", str(options.updates)]
        child = [sys.executable, "-m", "benchmarks.strategy_memory", "--child", name, *arguments]
        if options.folder:
            child += ["--folder", str(options.folder)]
        process = subprocess.run(child, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
        by_strategy[name] = json.loads(process.stdout)
    for result in by_strategy.values():
        result["ratio"] = round(result["peak_mb"] / by_strategy[_REFERENCE]["peak_mb"], 3)
    return {"size_mb": options.size_mb, "updates": options.updates, "strategies": by_strategy}


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    names = ("peak_mb", "ratio", "fold_s", "finish_s")
    rows = [
        [name, *(result[key] for key in names)] for name, result in results["strategies"].items()
    ]
    head = [f"{results['updates']} updates of {results['size_mb']:g} MB", "peak, MB", "of fedavg"]
    return command.table([*head, "folding, s", "closing, s"], rows)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("strategy_memory", __doc__)
    parser.add_argument("--size-mb", type=float, default=100.0, help="size of the model (100)")
    parser.add_argument("--updates", type=int, default=30, help="updates per round (30)")
    parser.add_argument("--strategies", nargs="+", default=_STRATEGIES, help="strategies, by name")
    parser.add_argument("--folder", type=Path, help="folder for updates on disk (.)")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with scratch(options.folder or Path()) as folder:
            result = one_round(options.child, options.size_mb, options.updates, folder)
        print(json.dumps(result))
        return
    options.strategies = [_REFERENCE, *(n for n in options.strategies if n != _REFERENCE)]
    command.show(measure(options), options, as_text)


if __name__ == "__main__":
    main()
