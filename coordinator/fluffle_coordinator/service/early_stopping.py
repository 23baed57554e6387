"""Early stopping: at a target, without progress, or out of time. Pure.

The monitored metric comes from the federated evaluation, which follows one round later because
workers evaluate the model that they are sent, or, as ``test/NAME``, from the coordinator's test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fluffle_common.plural import plural
from fluffle_common.protocol.events import decimal
from fluffle_common.protocol.metric_names import TEST_PREFIX, lower_is_better
from fluffle_coordinator.observe.times import duration
from fluffle_coordinator.storage.round_stats import seconds_of


@dataclass(frozen=True)
class Stopping:
    """The rules of early stopping; a rule that is None does not apply."""

    # The metric that decides, and by which the best model is kept. None decides by the loss and
    # keeps no best model.
    monitor: str | None = None
    target: float | None = None  # end the run when a model reaches this value
    patience: int | None = None  # end the run when the best model is this many rounds old
    # End the run when its rounds, including those before a restart, took this many seconds.
    time_budget_s: float | None = None

    @property
    def metric(self) -> str:
        """The name of the metric that decides."""
        return self.monitor or "loss"


NO_STOPPING = Stopping()


class Standing:
    """The progress of a run by its monitored metric, from the lines of its history on.

    Example:
        >>> standing = Standing(Stopping("accuracy", patience=2))
        >>> for number, accuracy in enumerate([0.5, 0.75, 0.75, 0.7], start=1):
        ...     standing.note(number, {"accuracy": accuracy})
        >>> standing.best, standing.enough()
        (2, 'accuracy has not improved for 2 rounds; the best is 0.7500 in round 2 (--patience)')
    """

    def __init__(self, stopping: Stopping, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._stopping = stopping
        self._sign = -1 if lower_is_better(stopping.metric) else 1
        self.best: int | None = None  # the round with the best model
        self._since: int | None = None  # that round, or the first one measured while there is none
        self._value, self._latest, self._seconds = math.nan, 0, 0.0
        self._names: dict[str, None] = {}  # of the metrics that ``missing`` has seen
        for line in lines:
            if line["event"] in ("evaluated", "tested"):
                self.note(line["round"], line)
            elif line["event"] == "committed":
                self.add_time(line["timings"])

    def add_time(self, timings: Mapping[str, float]) -> None:
        """Add the time of a round."""
        self._seconds += seconds_of(timings)

    def note(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Compare the metrics of a round's model with the best so far.

        A value that is not finite, None in the history, is never better.
        """
        if self._stopping.metric not in metrics:
            return
        self._latest = max(self._latest, number)
        self._since = number if self._since is None else self._since
        value = metrics[self._stopping.metric]
        if not isinstance(value, int | float) or not math.isfinite(value):
            return
        if self.best is None or self._sign * value > self._sign * self._value:
            self.best, self._since, self._value = number, number, value

    def missing(self, metrics: Mapping[str, Any]) -> str | None:
        """Return a warning if the metrics lack the monitored one, which should be among them.

        ``metrics`` is empty if no worker has evaluated a model.
        """
        self._names |= dict.fromkeys(metrics)
        rules, name = self._stopping, self._stopping.metric
        monitored = (rules.monitor, rules.target, rules.patience) != (None, None, None)
        of_a_test = any(metric.startswith(TEST_PREFIX) for metric in metrics)
        if not monitored or name in metrics or name.startswith(TEST_PREFIX) != of_a_test:
            return None
        remedy = f"choose from {', '.join(self._names)}" if self._names else "add --evaluate"
        why = "" if metrics else ", because no worker has evaluated a model"
        return f"no round has the metric '{name}' (--monitor){why}; {remedy}"

    def enough(self) -> str:
        """Return the reason to end the run; empty to continue."""
        rules, name = self._stopping, self._stopping.metric
        if self._since is not None:
            of = f"{decimal(self._value)} in round {self._since}"
            if rules.target is not None and self._sign * (self._value - rules.target) >= 0:
                return f"{name} reached {of} (--target {rules.target:g})"
            if rules.patience is not None and self._latest - self._since >= rules.patience:
                rounds = plural(rules.patience, "round")
                return f"{name} has not improved for {rounds}; the best is {of} (--patience)"
        if rules.time_budget_s is not None and self._seconds >= rules.time_budget_s:
            return (
                f"all rounds together took {duration(self._seconds)} (--time-budget "
                f"{rules.time_budget_s:g})"
            )
        return ""
