"""A model's evaluation: its averages over the workers, as its line in the history has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fluffle_common.protocol.metric_names import TEST_PREFIX, avoid_fields
from fluffle_coordinator.machine.records import Evaluated
from fluffle_coordinator.storage.round_stats import weighted_mean

# The field names of a round's history lines and of the Evaluated event. Readers merge those into
# one mapping, so a metric of one of these names is renamed.
_FIELDS = frozenset(
    "asked base bytes checkpoint committed_at delta ended_at epsilon evaluated_at evaluations "
    "evaluators event "
    "federation late late_updates loss metrics num_examples opened_at outcome participants reason "
    "rejected rejections round rounds run strategy tested_at time timings train_loss".split()
)


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
