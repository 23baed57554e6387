"""Peak memory of a coordinator's averaging: each mean in a process of its own, beside FedAvg.

    python -m benchmarks.robust --size-mb 100 --updates 30 --json

What a round does is done: updates come one at a time, as views of a payload; each is checked, laid
on disk where the mean needs all of them at once, and folded; then the round is closed. The updates
are random, and are made anew one by one. ``peak_mb`` is the most memory that the process ever had
resident (files that are mapped count), less what it had before the first model was there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command, figures
from benchmarks.arrays import make_weights
from benchmarks.processes import ROOT
from fluffle_common.tensors.layout import Layout, Tensors, layout_for
from fluffle_common.tensors.on_disk import map_to_disk
from fluffle_common.tensors.weights import check_delta
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.names import named_strategy

_REFERENCE = "fedavg"
_STRATEGIES = (_REFERENCE, "median", "trimmed:0.2", "krum:f=2", "rfa", "clip:1+median", "fedadam")


def _memory_mb(line: str) -> float:
    """Return what Linux says of this process: ``VmRSS``, or ``VmHWM``, the peak of that."""
    (told,) = re.findall(rf"{line}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(told) * 1024 / 1e6


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _random_update(layout: Layout, numbers: np.random.Generator) -> Tensors:
    delta = layout.over(memoryview(bytearray(layout.nbytes)))
    for tensor in delta.values():
        numbers.standard_normal(out=tensor, dtype=tensor.dtype)
    return delta


def one_round(name: str, size_mb: float, updates: int, folder: Path) -> dict[str, float]:
    """Run one round in this process; return its peak memory and its times."""
    strategy = named_strategy(name).strategy
    numbers = np.random.default_rng(0)
    before = _memory_mb("VmRSS")
    weights = make_weights(round(size_mb * 1e6))
    _forget_peak()  # that of making random weights
    layout = layout_for(weights)
    state = strategy.init(weights)
    fold_s = 0.0
    for place in range(updates):
        delta = _random_update(layout, numbers)
        began = time.perf_counter()
        check_delta(delta, weights)
        one = Contribution(
            worker=f"w{place:03d}",
            num_examples=100 + place,
            delta=delta,
            lay_on_disk=lambda tensors: map_to_disk(tensors, folder),
        )
        state = strategy.fold(state, one)
        fold_s += time.perf_counter() - began
        del delta, one  # before the next is made
    began = time.perf_counter()
    strategy.finish(state, weights)
    finish_s = time.perf_counter() - began
    return {
        "peak_mb": round(_memory_mb("VmHWM") - before, 1),
        "fold_s": round(fold_s, 3),
        "finish_s": round(finish_s, 3),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every strategy in a child of its own, and compare their peaks with that of FedAvg."""
    found: dict[str, dict[str, float]] = {}
    for name in options.strategies:
        words = ["--size-mb", str(options.size_mb), "--updates", str(options.updates)]
        child = [sys.executable, "-m", "benchmarks.robust", "--child", name, *words]
        if options.folder:
            child += ["--folder", str(options.folder)]
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
        found[name] = json.loads(done.stdout)
    for one in found.values():
        one["ratio"] = round(one["peak_mb"] / found[_REFERENCE]["peak_mb"], 3)
    return {"size_mb": options.size_mb, "updates": options.updates, "strategies": found}


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    names = ("peak_mb", "ratio", "fold_s", "finish_s")
    rows = [[name, *(one[key] for key in names)] for name, one in told["strategies"].items()]
    head = [f"{told['updates']} updates of {told['size_mb']:g} MB", "peak, MB", "over fedavg"]
    return figures.table([*head, "folding, s", "closing, s"], rows)


def main() -> None:
    """Measure, and print."""
    parser = command.parser("robust", __doc__)
    parser.add_argument("--size-mb", type=float, default=100.0, help="size of the model (100)")
    parser.add_argument("--updates", type=int, default=30, help="updates of the round (30)")
    parser.add_argument("--strategies", nargs="+", default=_STRATEGIES, help="which, by name")
    parser.add_argument("--folder", type=Path, help="where updates are laid on disk (here)")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with tempfile.TemporaryDirectory(dir=options.folder or Path()) as folder:
            found = one_round(options.child, options.size_mb, options.updates, Path(folder))
        print(json.dumps(found))
        return
    options.strategies = [_REFERENCE, *(n for n in options.strategies if n != _REFERENCE)]
    command.show(measure(options), options, as_text)


if __name__ == "__main__":
    main()
