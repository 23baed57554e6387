"""The names of metrics where they stand beside other fields, as in a line of the history."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")
TEST = "test/"
"""What the names of metrics of the coordinator's own test begin with, beside the federated ones."""

_PREFIX = "metric/"
TEST = "test/"
"""What the coordinator's own test measures is called ``test/NAME`` beside the federated metrics."""


def beside(metrics: Mapping[str, T], fields: Collection[str]) -> dict[str, T]:
    """Return metrics under names that none of these fields has.

    A task may call its metrics what it likes. One called as a field is written with a prefix, and
    so is one that has the prefix already: no two metrics come to have one name.

    Example:
        >>> beside({"accuracy": 0.5, "round": 1.0, "metric/round": 2.0}, {"round"})
        {'accuracy': 0.5, 'metric/round': 1.0, 'metric/metric/round': 2.0}
    """
    return {
        f"{_PREFIX}{name}" if name in fields or name.startswith(_PREFIX) else name: value
        for name, value in metrics.items()
    }


def of_a_test(metrics: Mapping[str, T]) -> dict[str, T]:
    """Return what the coordinator's own test measured, by the names that it has elsewhere.

    Example:
        >>> of_a_test({"accuracy": 0.5})
        {'test/accuracy': 0.5}
    """
    return {f"{TEST}{name}": value for name, value in metrics.items()}


def lower_is_better(metric: str) -> bool:
    """Whether the lowest value of a metric is the best, which its name says.

    Example:
        >>> [lower_is_better(name) for name in ("loss", "test/loss", "error", "accuracy")]
        [True, True, True, False]
    """
    return metric.endswith(("loss", "error"))
