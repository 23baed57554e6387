"""Statistics of measured times, and the order in which blocks of rounds run. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the ratio of the medians.

    >>> ratio([3.0, 100.0, 3.0], [2.0, 2.0, 2.0])
    1.5
    """
    return statistics.median(ours) / statistics.median(theirs)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, mean, quartiles and all times, rounded to microseconds.

    >>> summary([0.3, 0.1, 0.2])["median_s"]
    0.2
    """
    # Quartiles need at least two values.
    values = seconds if len(seconds) > 1 else [*seconds, *seconds]
    lower, _, upper = statistics.quantiles(values, method="inclusive")
    return {
        "median_s": round(statistics.median(seconds), 6),
        "mean_s": round(statistics.fmean(seconds), 6),
        "quartiles_s": [round(lower, 6), round(upper, 6)],
        "times_s": [round(each, 6) for each in seconds],
    }


def enough_rounds(size_mb: float) -> int:
    """Return the number of rounds for a reliable median; short rounds vary more.

    >>> enough_rounds(0.1), enough_rounds(1.36), enough_rounds(100)
    (300, 22, 12)
    """
    return max(12, round(30 / size_mb))


def shares(rounds: int, blocks: int) -> list[int]:
    """Distribute rounds over blocks as evenly as possible; no block is empty.

    >>> shares(10, 4), shares(2, 5)
    ([3, 3, 2, 2], [1, 1])
    """
    blocks = max(1, min(blocks, rounds))
    return [rounds // blocks + (number < rounds % blocks) for number in range(blocks)]


def interleaved(sides: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield the side and size of each block, alternately in forward and backward order.

    A machine that becomes slower or faster meanwhile then affects all sides alike.

    >>> list(interleaved(["floor", "fluffle"], [3, 2]))
    [('floor', 3), ('fluffle', 3), ('fluffle', 2), ('floor', 2)]
    """
    for number, size in enumerate(sizes):
        for side in sides if number % 2 == 0 else reversed(sides):
            yield side, size


def gaps(moments: Sequence[float]) -> list[float]:
    """Return the time from each moment to the next.

    >>> gaps([1.0, 3.0, 4.0])
    [2.0, 1.0]
    """
    return [after - before for before, after in pairwise(moments)]


def growth(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the growth of a time relative to the growth of a count, from first to last.

    1.0 is proportional growth; less is better.

    >>> growth([10, 100], [1.0, 5.0])
    0.5
    """
    return (seconds[-1] / seconds[0]) / (counts[-1] / counts[0])
