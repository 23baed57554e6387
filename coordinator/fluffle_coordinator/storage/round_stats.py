"""Statistics of a round for the history: averages, late and rejected updates, and timings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from fluffle_common.clock import monotonic, timestamp
from fluffle_common.protocol.events import Late, Rejected, RunEvent
from fluffle_common.protocol.metric_names import PERSONAL_PREFIX, TEST_PREFIX, avoid_fields
from fluffle_coordinator.machine.norms import with_median
from fluffle_coordinator.machine.records import Evaluated

_MOST_DETAILS = 50  # so that a flood of bad updates does not flood the history
# The field names of a round's history lines and of the Evaluated event. Readers merge those into
# one mapping, so a metric of one of these names is renamed.
_FIELDS = frozenset(
    "asked base bytes checkpoint committed_at delta ended_at epsilon evaluated_at evaluations "
    "evaluators event "
    "federation late late_updates loss metrics num_examples opened_at outcome participants reason "
    "rejected rejections round rounds run strategy tested_at time timings train_loss".split()
)


def weighted_mean(values: Iterable[tuple[int, float]]) -> float | None:
    """Return the mean of finite ``(num_examples, value)`` pairs; None if there are no examples.

    The mean is finite even if the sum of the values is not.

    >>> weighted_mean([(1, 1.0), (3, 2.0)])
    1.75
    >>> weighted_mean([(10, 1.7e308), (10, 1.7e308)])
    1.7e+308
    """
    pairs = list(values)
    total = sum(n for n, _ in pairs)
    if not total:
        return None
    mean = sum(n * value for n, value in pairs) / total
    return mean if math.isfinite(mean) else float(sum(n * Fraction(v) for n, v in pairs) / total)


def mean_train_loss(participants: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the participants' mean training loss, weighted by examples; None if there is none."""
    return weighted_mean(
        (each["num_examples"], each["train_loss"])
        for each in participants
        if each["train_loss"] is not None
    )


def personal_means(participants: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the participants' means of the metrics of what they trained, weighted by examples.

    Example:
        >>> three = {"num_examples": 3, "metrics": {"personal_loss": 1.0, "steps": 5.0}}
        >>> personal_means([three, {"num_examples": 1, "metrics": {"personal_loss": 2.0}}])
        {'personal_loss': 1.25}
    """
    pairs: dict[str, list[tuple[int, float]]] = {}
    for each in participants:
        for name, value in each.get("metrics", {}).items():
            if name.startswith(PERSONAL_PREFIX):
                pairs.setdefault(name, []).append((each["num_examples"], value))
    means = {name: weighted_mean(values) for name, values in pairs.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def average_evaluations(evaluations: Mapping[str, Evaluated]) -> dict[str, Any]:
    """Average evaluations, weighted by examples; each metric over the workers that report it.

    Example:
        >>> a, b = Evaluated(1, 1.0, {"accuracy": 0.0}), Evaluated(3, 2.0, {"accuracy": 1.0})
        >>> averages = average_evaluations({"a": a, "b": b})
        >>> averages["loss"], averages["accuracy"]
        (1.75, 0.75)
    """
    every = evaluations.values()
    names = sorted({name for e in every for name in e.metrics})
    metrics = {
        name: weighted_mean([(e.num_examples, e.metrics[name]) for e in every if name in e.metrics])
        for name in names
    }
    return {
        "num_examples": sum(e.num_examples for e in every),
        "loss": weighted_mean([(e.num_examples, e.loss) for e in every]),
        **avoid_fields(
            metrics, _FIELDS | {name for name in metrics if name.startswith(TEST_PREFIX)}
        ),
        "evaluators": sorted(evaluations),
    }


def evaluation_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the loss and the metrics of an evaluation's averages or line; NaN for None."""
    metrics = {"loss": line["loss"], **{n: v for n, v in line.items() if n not in _FIELDS}}
    return {
        name: math.nan if value is None else value
        for name, value in metrics.items()
        if value is None or isinstance(value, float)  # else a field of a later version
    }


@dataclass
class Counts:
    """How many updates were late or rejected since the last commit, with details of the first."""

    late: int = 0
    rejected: int = 0
    late_updates: list[Mapping[str, Any]] = field(default_factory=list)
    rejections: list[Mapping[str, Any]] = field(default_factory=list)

    def note(self, event: RunEvent) -> None:
        """Count an event if it is about a late or a rejected update."""
        match event:
            case Late():
                self.late += 1
                details = self.late_updates
            case Rejected():
                self.rejected += 1
                details = self.rejections
            case _:
                return
        if len(details) < _MOST_DETAILS:
            details.append(event.fields())


def add_uncounted(line: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round's line with the late and rejected updates of a later line added."""
    none = vars(Counts())
    return {**line, **{n: line.get(n, none[n]) + later.get(n, none[n]) for n in none}}


@dataclass
class Clock:
    """When the steps of a round happened, in seconds of a monotonic clock.

    ``opened`` is the opening as a timestamp. From ``closed_at`` on, nothing more is folded.
    """

    opened_at: float = field(default_factory=monotonic)
    opened: str = ""
    closed_at: float = 0.0
    averaged_at: float = 0.0
    fold_s: float = 0.0

    def open(self) -> None:
        """Note that the round is open."""
        self.opened_at, self.opened = monotonic(), timestamp()

    def timings(self, committed_at: float, saved_at: float) -> dict[str, float]:
        """Return the seconds of each step, in order, between the times of two rounds on disk.

        ``fold_s`` is a part of ``open_s``.
        """
        seconds = {
            "waiting_s": self.opened_at - committed_at,
            "open_s": self.closed_at - self.opened_at,
            "average_s": self.averaged_at - self.closed_at,
            "checkpoint_s": saved_at - self.averaged_at,
            "fold_s": self.fold_s,
        }
        return {name: round(value, 6) for name, value in seconds.items()}


def examples_by_worker(participants: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many examples of each worker a round counted.

    An asynchronous round can count a worker more than once.
    """
    examples: Counter[str] = Counter()
    for participant in participants:
        examples[participant["worker"]] += participant["num_examples"]
    return dict(examples)


def median_norms(commits: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return the medians of the updates' norms that the machine remembered after these commits."""
    medians: tuple[float, ...] = ()
    for line in commits:
        medians = with_median(medians, [who["norm"] or 0.0 for who in line["participants"]])
    return medians


def seconds_of(timings: Mapping[str, float]) -> float:
    """Return how long a round took in total, from the previous commit to its own.

    >>> seconds_of({"waiting_s": 1.0, "open_s": 2.0, "average_s": 0.5, "fold_s": 1.5})
    3.5
    """
    return sum(seconds for name, seconds in timings.items() if name != "fold_s")
