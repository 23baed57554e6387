"""Folding and averaging updates, beside the plainest loop that could add them up.

    python -m benchmarks.aggregate --size-mb 100 --updates 5

The plain loop is a blocked ``axpy``: ``total += n * update`` in float64, a block of each array at a
time, with one block of scratch memory and nothing else: no checks, no division, no cast back, and
no weights to add to. fluffle's side is the strategy ``fedavg``: a fold an update, and one average
for all of them. Both get the same arrays, in the same process, in turn. The times are for 100 MB of
updates, so that sizes can be compared; ``check`` is ``check_delta``, apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command, figures
from benchmarks.arrays import Array, Perturbation, make_weights
from fluffle_common.tensors.weights import check_delta, delta, size_bytes
from fluffle_coordinator.strategy.base import Contribution
from fluffle_coordinator.strategy.fedavg import fedavg

_BLOCK = 32 * 1024
_COUNTS = (100, 150, 225)


def axpy(totals: Mapping[str, Array], update: Mapping[str, Array], count: int) -> None:
    """Add ``count`` times an update to float64 totals, in place, a block at a time."""
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
    """Both ways over the same updates.

    Args:
        size_mb: of the model.
        updates: how many are folded into one average.
    """

    def __init__(self, size_mb: float, updates: int) -> None:
        self.weights = make_weights(round(size_mb * 1e6))
        self.updates = [
            delta(Perturbation(seed)(self.weights), self.weights) for seed in range(updates)
        ]
        self.totals = {name: np.zeros(t.shape, np.float64) for name, t in self.weights.items()}
        self.state = fedavg.init(self.weights)

    def plain(self) -> None:
        """Add all of them up."""
        for number, update in enumerate(self.updates):
            axpy(self.totals, update, _COUNTS[number % len(_COUNTS)])

    def fold(self) -> None:
        """Fold all of them."""
        for number, update in enumerate(self.updates):
            count = _COUNTS[number % len(_COUNTS)]
            one = Contribution(worker="a", num_examples=count, delta=update)
            self.state = fedavg.fold(self.state, one)

    def average(self) -> None:
        """Average what was folded."""
        _, self.state = fedavg.finish(self.state, self.weights)

    def check(self) -> None:
        """Check all of them, as is done before they are folded."""
        for update in self.updates:
            check_delta(update, self.weights)


def measure(size_mb: float, updates: int, repeats: int) -> dict[str, Any]:
    """Run both ways in turn and return milliseconds for 100 MB of updates."""
    both = Aggregating(size_mb, updates)
    works: dict[str, Callable[[], None]] = {
        "axpy": both.plain,
        "fold": both.fold,
        "average": both.average,
        "check": both.check,
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if repeat:  # the first touches the memory
                seconds[name].append(time.perf_counter() - began)
    whole = [fold + mean for fold, mean in zip(seconds["fold"], seconds["average"], strict=True)]
    seconds["fold+average"] = whole
    scale = 1e3 * 100e6 / (size_bytes(both.weights) * updates)
    return {
        "size_mb": size_mb,
        "updates": updates,
        "repeats": repeats,
        "ms_a_100_mb": {name: round(scale * _median(times), 3) for name, times in seconds.items()},
        "ratio": round(figures.ratio(whole, seconds["axpy"]), 3),
        "fold_ratio": round(figures.ratio(seconds["fold"], seconds["axpy"]), 3),
    }


def _median(times: Sequence[float]) -> float:
    return float(figures.summary(times)["median_s"])


def as_text(told: Mapping[str, Any]) -> str:
    """Lay the findings out for people."""
    rows = [[name, value] for name, value in told["ms_a_100_mb"].items()]
    head = [f"{told['size_mb']:g} MB, {told['updates']} updates", "ms a 100 MB"]
    return (
        f"{figures.table(head, rows)}\n"
        f"ratio {told['ratio']:.2f} (fold and average over axpy), of the fold alone "
        f"{told['fold_ratio']:.2f}"
    )


def main() -> None:
    """Measure, and print."""
    parser = command.parser("aggregate", __doc__)
    parser.add_argument("--size-mb", type=float, default=100.0, help="size of the model (100)")
    parser.add_argument("--updates", type=int, default=3, help="updates of a round (3)")
    parser.add_argument("--repeats", type=int, default=7, help="how often (7)")
    options = parser.parse_args()
    told = measure(options.size_mb, options.updates, options.repeats)
    command.show(told, options, as_text)


if __name__ == "__main__":
    main()
