"""What is made of measured times: medians, ratios, the order of blocks, tables. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Divide median by median.

    >>> ratio([3.0, 100.0, 3.0], [2.0, 2.0, 2.0])
    1.5
    """
    return statistics.median(ours) / statistics.median(theirs)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, the mean, the quartiles and all of the times, rounded to the microsecond.

    >>> summary([0.3, 0.1, 0.2])["median_s"]
    0.2
    """
    least = [*seconds, *seconds]  # of a single time there are no quartiles
    lower, _, upper = statistics.quantiles(
        seconds if len(seconds) > 1 else least, method="inclusive"
    )
    return {
        "median_s": round(statistics.median(seconds), 6),
        "mean_s": round(statistics.fmean(seconds), 6),
        "quartiles_s": [round(lower, 6), round(upper, 6)],
        "times_s": [round(each, 6) for each in seconds],
    }


def enough_rounds(size_mb: float) -> int:
    """Return how many rounds make a median that can be trusted: short ones differ more.

    >>> enough_rounds(0.1), enough_rounds(1.36), enough_rounds(100)
    (300, 22, 12)
    """
    return max(12, round(30 / size_mb))


def shares(rounds: int, blocks: int) -> list[int]:
    """Share rounds out to blocks, as evenly as can be; no block is empty.

    >>> shares(10, 4), shares(2, 5)
    ([3, 3, 2, 2], [1, 1])
    """
    blocks = max(1, min(blocks, rounds))
    return [rounds // blocks + (number < rounds % blocks) for number in range(blocks)]


def interleaved(sides: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield whose block is next, and its size: forwards, then backwards, and so on.

    So a machine that becomes slower or faster meanwhile does so for all sides alike.

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
    """Return by how much more than in proportion a time has grown, from the first to the last.

    1.0 is growth in proportion to the count; less is better.

    >>> growth([10, 100], [1.0, 5.0])
    0.5
    """
    return (seconds[-1] / seconds[0]) / (counts[-1] / counts[0])


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a table in plain text; the first column to the left, numbers to the right.

    >>> print(table(["size", "ms"], [["1 MB", 3.14159], ["10 MB", None]]))
    size     ms
    1 MB   3.14
    10 MB     -
    """
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *others = row
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
