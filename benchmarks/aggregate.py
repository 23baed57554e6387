"""Time to fold and average updates, relative to a minimal loop that adds them up.

    python -m benchmarks.aggregate --size-mb 100 --updates 5

The minimal loop is a blocked ``axpy``: ``total += n * update`` in float64, one block of an array at
a time, without checks, division, cast or weights to add to. fluffle's side is the strategy
``fedavg``: one fold per update and one average. Both use the same arrays in the same process, in
turn. Times are per 100 MB of updates, so that sizes can be compared; ``check`` is ``check_delta``,
which is not part of the ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command, stats
from benchmarks.arrays import Array, Perturbation, make_weights
from fluffle_common.tensors.weights import check_delta, delta, size_bytes
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.fedavg import fedavg

_BLOCK = 32 * 1024
_COUNTS = (100, 150, 225)


def axpy(totals: Mapping[str, Array], update: Mapping[str, Array], count: int) -> None:
    """Add ``count`` times an update to float64 totals, in place and blockwise."""
    scratch = np.empty(_BLOCK, np.float64)
    factor = np.float64(count)
    for name, total in totals.items():
        flat, values = total.reshape(-1), update[name].reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            scaled = scratch[: part.size]
            np.multiply(values[start : start + _BLOCK], factor, out=scaled)
            np.add(part, scaled, out=part)


class Aggregating:
    """Both implementations on the same updates.

    Args:
        size_mb: the size of the model in megabytes.
        updates: the number of updates per average.
    """

    def __init__(self, size_mb: float, updates: int) -> None:
        self.weights = make_weights(round(size_mb * 1e6))
        self.updates = [
            delta(Perturbation(seed)(self.weights), self.weights) for seed in range(updates)
        ]
        self.totals = {name: np.zeros(t.shape, np.float64) for name, t in self.weights.items()}
        self.state = fedavg.init(self.weights)

    def plain(self) -> None:
        """Add all updates with ``axpy``."""
        for number, update in enumerate(self.updates):
            axpy(self.totals, update, _COUNTS[number % len(_COUNTS)])

    def fold(self) -> None:
        """Fold all updates."""
        for number, update in enumerate(self.updates):
            count = _COUNTS[number % len(_COUNTS)]
            contribution = Contribution(worker="a", num_examples=count, delta=update)
            self.state = fedavg.fold(self.state, contribution)

    def average(self) -> None:
        """Average the folded updates."""
        _, self.state = fedavg.finish(self.state, self.weights)

    def check(self) -> None:
        """Check all updates, as the coordinator does before it folds them."""
        for update in self.updates:
            check_delta(update, self.weights)


def measure(size_mb: float, updates: int, repeats: int) -> dict[str, Any]:
    """Run both implementations in turn and return milliseconds per 100 MB of updates."""
    both = Aggregating(size_mb, updates)
    functions: dict[str, Callable[[], None]] = {
        "axpy": both.plain,
        "fold": both.fold,
        "average": both.average,
        "check": both.check,
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if repeat:  # the first run touches the memory
                seconds[name].append(time.perf_counter() - began)
    total = [fold + mean for fold, mean in zip(seconds["fold"], seconds["average"], strict=True)]
    seconds["fold+average"] = total
    scale = 1e3 * 100e6 / (size_bytes(both.weights) * updates)
    return {
        "size_mb": size_mb,
        "updates": updates,
        "repeats": repeats,
        "ms_a_100_mb": {name: round(scale * _median(times), 3) for name, times in seconds.items()},
        "ratio": round(stats.ratio(total, seconds["axpy"]), 3),
        "fold_ratio": round(stats.ratio(seconds["fold"], seconds["axpy"]), 3),
    }


def _median(times: Sequence[float]) -> float:
    return float(stats.summary(times)["median_s"])


def as_text(results: Mapping[str, Any]) -> str:
    """Return the results as a table."""
    rows = [[name, value] for name, value in results["ms_a_100_mb"].items()]
    head = [f"{results['size_mb']:g} MB, {results['updates']} updates", "ms a 100 MB"]
    return (
        f"{command.table(head, rows)}\n"
        f"ratio of fold and average to axpy {results['ratio']:.2f}; of the fold alone "
        f"{results['fold_ratio']:.2f}"
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = command.parser("aggregate", __doc__)
    parser.add_argument("--size-mb", type=float, default=100.0, help="size of the model (100)")
    parser.add_argument("--updates", type=int, default=3, help="updates per round (3)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions (7)")
    options = parser.parse_args()
    command.show(measure(options.size_mb, options.updates, options.repeats), options, as_text)


if __name__ == "__main__":
    main()
