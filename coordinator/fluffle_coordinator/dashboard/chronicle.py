"""The rounds of a run on the page: what was committed, how it was evaluated. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fluffle_coordinator.dashboard.roster import clipped

_ROUNDS = 2000  # points of the chart
_DETAILED = 50  # rounds in full
_METRICS = 6

STEPS = ("waiting", "open", "fold", "average", "checkpoint")
"""The parts of a round's time, as ``timings`` of a committed round names them (``<step>_s``)."""

# What a line of the history says besides the metrics of its evaluation, which stand beside these.
_NO_METRIC = {"round", "loss", "num_examples", "late", "rejected"}


class Chronicle:
    """What is known of every round, the oldest forgotten where they are too many."""

    def __init__(self) -> None:
        self._rounds: dict[int, dict[str, Any]] = {}

    @property
    def committed(self) -> int:
        """The last committed round; 0 where there is none."""
        return max((n for n, known in self._rounds.items() if "committed_at" in known), default=0)

    @property
    def next(self) -> int:
        """The round after the last that anything is known of."""
        return max(self._rounds, default=0) + 1

    def commit(self, time: float, fields: Mapping[str, Any], opened_at: float | None) -> None:
        """Take in that a round was committed."""
        self._of(fields["round"]).update(
            participants=list(fields.get("participants", ())),
            opened_at=opened_at,
            committed_at=time,
            timings=timings(fields),
        )

    def evaluate(self, fields: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Take in how the model of a round was evaluated."""
        self._of(fields["round"]).update(
            loss=finite(fields.get("loss")),
            metrics={
                clipped(name, 64): finite(value)
                for name, value in metrics.items()
                if name not in ("loss", "rounds")
            },
            num_examples=fields.get("num_examples"),
        )

    def remember(self, line: Mapping[str, Any]) -> None:
        """Take in a round of a history, as ``store.read_history`` returns it."""
        if "committed_at" in line:
            names = [one["worker"] for one in line.get("participants", ())]
            at = moment(line["committed_at"]) or 0.0
            self.commit(at, {**line, "participants": names}, moment(line.get("opened_at")))
        if "loss" in line:
            told = {n: v for n, v in line.items() if isinstance(v, float) and n not in _NO_METRIC}
            self.evaluate(line, told)

    def detailed(self) -> list[dict[str, Any]]:
        """Return the latest rounds in full, in order."""
        return [self._rounds[number] for number in sorted(self._rounds)[-_DETAILED:]]

    def curves(self) -> dict[str, Any]:
        """Return the evaluated rounds as one list a metric, all as long as ``rounds``."""
        known = [self._rounds[number] for number in sorted(self._rounds)]
        told = [one for one in known if one.get("loss") is not None]
        names = sorted({name for one in told for name in one["metrics"]})[:_METRICS]
        return {
            "rounds": [one["round"] for one in told],
            "loss": [one["loss"] for one in told],
            **{name: [one["metrics"].get(name) for one in told] for name in names},
        }

    def latest(self, metric: str) -> float | None:
        """Return the newest value of a metric, or of ``loss``; None where there is none."""
        for number in sorted(self._rounds, reverse=True):
            known = self._rounds[number]
            value = known.get("loss") if metric == "loss" else known.get("metrics", {}).get(metric)
            if value is not None:
                return float(value)
        return None

    def _of(self, number: int) -> dict[str, Any]:
        if number not in self._rounds and len(self._rounds) >= _ROUNDS:
            del self._rounds[min(self._rounds)]
        return self._rounds.setdefault(number, {"round": number})


def timings(fields: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each of ``STEPS`` that a committed round tells."""
    told = fields.get("timings") or {}
    return {s: told[f"{s}_s"] for s in STEPS if finite(told.get(f"{s}_s")) is not None}


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
