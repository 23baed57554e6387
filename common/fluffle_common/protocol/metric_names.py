"""Names for metrics that share a flat record with other fields, such as a history line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")

_PREFIX = "metric/"
TEST_PREFIX = "test/"
"""Prefix of the metrics of the coordinator's own test, to tell them from the workers' metrics."""
PERSONAL_PREFIX = "personal_"
"""Prefix of the metrics of a model after a worker's local training, on what it holds out."""
_LOWER = ("loss", "error", "error_rate", "mse", "mae", "mape", "nll", "entropy", "perplexity")


def avoid_fields(metrics: Mapping[str, T], fields: Collection[str]) -> dict[str, T]:
    """Rename the metrics that have the name of a field, by adding a prefix.

    A metric that has the prefix already gets it again, so that no two metrics end up with the same
    name.

    Example:
        >>> avoid_fields({"accuracy": 0.5, "round": 1.0, "metric/round": 2.0}, {"round"})
        {'accuracy': 0.5, 'metric/round': 1.0, 'metric/metric/round': 2.0}
    """
    return {
        f"{_PREFIX}{name}" if name in fields or name.startswith(_PREFIX) else name: value
        for name, value in metrics.items()
    }


def add_test_prefix(metrics: Mapping[str, T]) -> dict[str, T]:
    """Return the metrics of the coordinator's own test under their prefixed names."""
    return {f"{TEST_PREFIX}{name}": value for name, value in metrics.items()}


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric are better, judging by its name.

    Example:
        >>> [lower_is_better(name) for name in ("test/loss", "error_rate", "RMSE", "accuracy")]
        [True, True, True, False]
    """
    return metric.lower().endswith(_LOWER)
