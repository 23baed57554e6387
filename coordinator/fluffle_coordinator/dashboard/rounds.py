"""The rounds of a run on the page: what was committed, how it was evaluated. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from fluffle_coordinator.dashboard.roster import clipped
from fluffle_coordinator.observe.run_view import RoundView, RunView
from fluffle_coordinator.observe.tally import step_times

_DETAILED = 50  # rounds in full
_METRICS = 6
# What a line of the history says besides the metrics of its evaluation, which stand beside these.
_NO_METRIC = {"round", "loss", "num_examples", "late", "rejected"}


def detailed(view: RunView) -> list[dict[str, Any]]:
    """Return the latest rounds that are done, in full and in order."""
    return [_row(one) for one in list(_done(view))[-_DETAILED:]]


def curves(view: RunView) -> dict[str, Any]:
    """Return the evaluated rounds as one list a metric, all as long as ``rounds``."""
    evaluated = [one for one in _done(view) if one.loss is not None]
    metrics = [_metrics(one) for one in evaluated]
    names = sorted({name for each in metrics for name in each})[:_METRICS]
    return {
        "rounds": [one.number for one in evaluated],
        "loss": [one.loss for one in evaluated],
        **{name: [each.get(name) for each in metrics] for name in names},
    }


def latest(view: RunView, metric: str) -> float | None:
    """Return the newest value of a metric, or of ``loss``; None where there is none."""
    for number in sorted(view.rounds, reverse=True):
        one = view.rounds[number]
        value = one.loss if metric == "loss" else _metrics(one).get(metric)
        if value is not None:
            return float(value)
    return None


def remembered(line: Mapping[str, Any]) -> RoundView:
    """Return a round of a history, as ``run_store.read_history`` has it."""
    one = RoundView(line["round"])
    if "committed_at" in line:
        one.asked_at = moment(line.get("opened_at"))
        one.committed_at = moment(line["committed_at"]) or 0.0
        one.participants = tuple(each["worker"] for each in line.get("participants", ()))
        one.timings = line.get("timings") or {}
    if "loss" in line:
        one.evaluated, one.loss = True, finite(line["loss"])
        one.evaluated_on = line.get("num_examples")
        found = {n: v for n, v in line.items() if isinstance(v, float) and n not in _NO_METRIC}
        one.metrics = {name: value for name, value in found.items() if math.isfinite(value)}
    return one


def _done(view: RunView) -> Iterator[RoundView]:
    for number in sorted(view.rounds):
        if view.rounds[number].is_done:
            yield view.rounds[number]


def _row(one: RoundView) -> dict[str, Any]:
    row: dict[str, Any] = {"round": one.number}
    if one.committed_at is not None:
        row |= {
            "participants": list(one.participants),
            "opened_at": one.asked_at,
            "committed_at": one.committed_at,
            "timings": step_times(one.timings),
        }
    if one.evaluated:
        row |= {"loss": one.loss, "metrics": _metrics(one), "num_examples": one.evaluated_on}
    return row


def _metrics(one: RoundView) -> dict[str, float]:
    found = one.metrics.items()
    return {clipped(name, 64): value for name, value in found if name not in ("loss", "rounds")}


def finite(value: Any) -> float | None:
    """Return a number that JSON can carry; None for anything else."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def moment(text: Any) -> float | None:
    """Return an ISO 8601 time as seconds since 1970; None where it is none.

    Example:
        >>> moment("1970-01-01T00:01:00.500+00:00"), moment("soon")
        (60.5, None)
    """
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None
