"""What the history tells of a round besides its average: what was not counted, and the time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from operator import sub
from typing import Any

from fluffle_common.clock import monotonic, timestamp
from fluffle_common.protocol.events import Late, Rejected, RunEvent

_TOLD_OF_EACH = 50  # a flood of rubbish must not make a flood of history


def weighted_mean(values: Iterable[tuple[int, float]]) -> float | None:
    """Average ``(num_examples, value)`` pairs; None where there are no examples.

    What is averaged is finite, and so is the average, even of values whose sum is not.

    >>> weighted_mean([(1, 1.0), (3, 2.0)])
    1.75
    >>> weighted_mean([(10, 1.7e308), (10, 1.7e308)])
    1.7e+308
    """
    pairs = list(values)
    total = sum(n for n, _ in pairs)
    if not total:
        return None
    found = sum(n * value for n, value in pairs) / total
    return found if math.isfinite(found) else float(sum(n * Fraction(v) for n, v in pairs) / total)


@dataclass
class Counts:
    """What came late and what was refused since the last commit, and of the first of them more."""

    late: int = 0
    rejected: int = 0
    late_updates: list[Mapping[str, Any]] = field(default_factory=list)
    rejections: list[Mapping[str, Any]] = field(default_factory=list)

    def note(self, event: RunEvent) -> None:
        """Count an event, if it is one that is counted."""
        match event:
            case Late():
                self.late += 1
                details = self.late_updates
            case Rejected():
                self.rejected += 1
                details = self.rejections
            case _:
                return
        if len(details) < _TOLD_OF_EACH:
            details.append(event.fields())


def with_later(line: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round's line with what a later one says was not counted either."""
    return {**line, **{name: line.get(name, none) + later[name] for name, none in _NONE.items()}}


_NONE: dict[str, Any] = vars(Counts())


@dataclass
class Clock:
    """Where the time of a round goes, in seconds of a monotonic clock.

    ``opened`` is the time of the opening for people.
    """

    opened_at: float = field(default_factory=monotonic)
    opened: str = ""
    closed_at: float = 0.0
    averaged_at: float = 0.0
    fold_s: float = 0.0

    def open(self) -> None:
        """Note that the round is open."""
        self.opened_at, self.opened = monotonic(), timestamp()

    def close(self) -> None:
        """Note that nothing more is folded."""
        self.closed_at = monotonic()

    def average(self) -> None:
        """Note that the average is known."""
        self.averaged_at = monotonic()

    def timings(self, committed_at: float, saved_at: float) -> dict[str, float]:
        """Tell what the time from commit to commit was spent on.

        Before the round, open (folding included), and closing it.

        Args:
            committed_at: when the round before was on disk.
            saved_at: when this one was.
        """
        moments = [self.opened_at, self.closed_at, self.averaged_at, saved_at]
        names = ("waiting_s", "open_s", "average_s", "checkpoint_s")
        told = dict(zip(names, map(sub, moments, [committed_at, *moments]), strict=True))
        return {
            name: round(seconds, 6) for name, seconds in {**told, "fold_s": self.fold_s}.items()
        }


def seconds_of(timings: Mapping[str, float]) -> float:
    """Return how long a round took in all, from the commit before to its own.

    >>> seconds_of({"waiting_s": 1.0, "open_s": 2.0, "average_s": 0.5, "fold_s": 1.5})
    3.5
    """
    return sum(seconds for name, seconds in timings.items() if name != "fold_s")
