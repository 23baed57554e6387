"""What the page and the report show of a run: a ``RunView`` as plain data, a key a section. Pure.

The page's own files draw it (``static/``): live as it changes, and in a report as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.observe.round_view import Answer, RoundView
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.tally import cause_of
from fluffle_coordinator.observe.worker_view import WorkerView, clipped
from fluffle_coordinator.storage.round_stats import weighted_mean

# At most, on a live page; a report has them all.
_WORKERS = 2000
_METRICS = 6


def results(view: RunView, current: int) -> dict[str, Any]:
    """Return the sections that a run leaves behind; ``current`` is the round at work."""
    workers = view.workers.in_order()[: None if view.whole else _WORKERS]
    return {
        "rounds": [_round(one) for one in view.detailed],
        "curves": curves(view),
        "staleness": staleness(view),
        "workers": [_worker(row, current) for row in workers],
        "rejected": rejected(view),
    }


def ending(event: RunEvent | None) -> str:
    """Say how a run has ended."""
    match event:
        case run_events.Finished(reason=reason) | run_events.Stopped(reason=reason):
            return f"{event.name}: {reason or ''}"
    return "interrupted: the same command (without --fresh) goes on from there"


def curves(view: RunView) -> dict[str, Any]:
    """Return what was measured of each round: one list a metric, all as long as ``rounds``.

    The training loss is in histories alone: of a live run it would end where the run was resumed.
    """
    told = [
        (one, {**_metrics(one), "loss": one.loss, "epsilon": one.epsilon,
               "training loss": train_loss(one.answers.values()) if view.whole else None})
        for one in view.done
    ]  # fmt: skip
    told = [(one, values) for one, values in told if any(v is not None for v in values.values())]
    named = {n: None for _, values in told for n, value in values.items() if value is not None}
    own = [name for name in ("loss", "training loss", "epsilon") if name in named]
    names = [*own, *sorted(named.keys() - own)[: None if view.whole else _METRICS]]
    return {
        "rounds": [one.number for one, _ in told],
        **{name: [values.get(name) for _, values in told] for name in names},
    }


def train_loss(answers: Iterable[Answer]) -> float | None:
    """Average the training loss over the examples of those who tell it; None if nobody does."""
    return weighted_mean(
        (one.num_examples or 0, one.train_loss) for one in answers if one.train_loss is not None
    )


def staleness(view: RunView) -> dict[str, Any] | None:
    """Say how stale updates were and what share of their weight that cost; None if none was stale.

    Returns:
        ``counts``, the number of updates by the versions that were committed since the one they
        were trained from, and ``lost``, the share from 0 to 1 of all their examples; None when no
        weight is told.
    """
    answers = [one for each in view.detailed for one in each.answers.values()]
    if not any(one.staleness for one in answers):
        return None
    # Of a fresh one neither its staleness nor its weight is told: 0, and all of its examples.
    counts = Counter(one.staleness or 0 for one in answers)
    weighed = [
        (one.num_examples if one.weight is None else one.weight, one.num_examples)
        for one in answers
        if one.num_examples is not None and (one.weight is not None or not one.staleness)
    ]
    told = any(one.weight is not None for one in answers)
    examples = sum(of for _, of in weighed) if told else 0
    lost = max(0.0, sum(of - weight for weight, of in weighed) / examples) if examples else None
    return {
        "counts": {str(versions): counts[versions] for versions in sorted(counts)},
        "lost": lost,
    }


def rejected(view: RunView) -> dict[str, Any]:
    """Return the latest messages that were rejected, all of them by cause, and how many."""
    latest = [
        {
            "id": number,
            "time": at,
            "during": during,
            "cause": cause_of(event),
            "reason": clipped(event.reason, 500),
            "kind": event.kind,
            "worker": event.worker,
            "round": event.round,
        }
        for number, (at, during, event) in enumerate(
            view.rejections, start=sum(view.causes.values()) - len(view.rejections)
        )
    ]
    # A history describes the first of a flood alone, and counts all.
    total = max(sum(view.causes.values()), sum(one.rejected for one in view.done))
    return {"latest": latest, "causes": dict(view.causes), "total": total}


def latest(view: RunView, metric: str) -> float | None:
    """Return the newest value of a metric, or of ``loss``; None when there is none."""
    for one in reversed(view.done):
        value = one.loss if metric == "loss" else _metrics(one).get(metric)
        if value is not None:
            return float(value)
    return None


def _round(one: RoundView) -> dict[str, Any]:
    row: dict[str, Any] = {"round": one.number}
    if one.committed_at is not None:
        answers, counted = one.answers, set(one.participants)
        row |= {
            "participants": list(one.participants),
            "examples": [
                answers[name].num_examples if name in answers else None for name in one.participants
            ],
            "asked": [name for name in one.asked if name not in counted],
            "came_late": sorted(one.came_late),
            "opened_at": one.asked_at,
            "committed_at": one.committed_at,
            "num_examples": one.num_examples,
            "bytes": sum(answer.bytes or 0 for answer in answers.values()),
            "train_loss": train_loss(answers.values()),
            "phases": one.phases,
            "late": one.late,
            "rejected": one.rejected,
        }
    if one.evaluated:
        row |= {"loss": one.loss, "evaluated_on": one.evaluated_on}
    if one.evaluated or one.metrics:
        row["metrics"] = _metrics(one)
    return row


def _metrics(one: RoundView) -> dict[str, float]:
    found = one.metrics.items()
    return {clipped(name, 64): value for name, value in found if name not in ("loss", "rounds")}


def _worker(row: WorkerView, current: int) -> dict[str, Any]:
    shown = (
        "name", "state", "why", "num_examples", "round", "step", "steps", "loss", "heartbeat_s",
        "last_seen", "counted", "late", "rejected", "bytes",
    )  # fmt: skip
    train_s = row.train_s / row.trained if row.trained else None
    told = {name: getattr(row, name) for name in shown}
    return {**told, "train_s": train_s, "doing": row.doing(current)}
