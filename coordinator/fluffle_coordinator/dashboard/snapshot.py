"""The sections that the live page and the report share: a ``RunView`` as plain data. Pure.

The scripts in ``static/`` draw them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.observe.round_view import RoundView
from fluffle_coordinator.observe.run_view import RunView, cause_of
from fluffle_coordinator.observe.worker_view import WorkerView, clipped
from fluffle_coordinator.storage.round_stats import weighted_mean

# Limits of a live page; a report has them all.
_MAX_WORKERS = 2000
_MAX_METRICS = 6
# The matrix of who took part in which round has at most so many cells, and so many rows.
_MAX_CELLS, _MAX_NAMES = 4000, 100
# Up to this number, empty queues of one kind each get a row.
_MAX_EMPTY_ROWS = 3
_QUEUES_OF_WORKERS = ("inbox", "outbox", "lock", "lock2", "tap")


def results(view: RunView) -> dict[str, Any]:
    """Return the sections about rounds, workers and rejections."""
    workers = view.workers.in_order()
    people = {
        "known": len(workers),
        "connected": sum(row.is_here for row in workers),
        "counted": sum(row.counted > 0 for row in workers),
        "late": sum(row.late for row in workers),
    }
    rounds = [_round(each) for each in view.detailed]
    return {
        **({"rounds": rounds, "unlisted": 0} if view.whole else named(rounds)),
        "curves": curves(view),
        "staleness": staleness(view),
        "people": people,
        "workers": list(map(_worker, workers[: None if view.whole else _MAX_WORKERS])),
        "rejected": rejected(view),
    }


def named(rounds: Sequence[Mapping[str, Any]], most_cells: int = _MAX_CELLS) -> dict[str, Any]:
    """Return the sections ``rounds``, naming only the workers that a page draws, and ``unlisted``.

    The latter is the number of the other workers. With 1,000 workers, this is a tenth of the bytes.
    """
    fields = ("participants", "asked", "came_late")
    names = sorted({name for row in rounds for field in fields for name in row.get(field, ())})
    room = min(_MAX_NAMES, max(1, most_cells // max(1, len(rounds))))
    if len(names) <= room:
        return {"rounds": list(rounds), "unlisted": 0}
    kept = set(names[:room])

    def trimmed(row: Mapping[str, Any]) -> dict[str, Any]:
        if "participants" not in row:
            return dict(row)
        pairs = zip(row["participants"], row["examples"], strict=True)
        counted = [(name, examples) for name, examples in pairs if name in kept]
        lists = {field: [name for name in row[field] if name in kept] for field in fields}
        return {**row, **lists, "examples": [examples for _, examples in counted]}

    return {"rounds": list(map(trimmed, rounds)), "unlisted": len(names) - room}


def grouped(figures: Iterable[Mapping[str, Any]], federation: str) -> list[Mapping[str, Any]]:
    """Return the queues' figures, with one row for many empty queues of a kind."""
    shown: list[Mapping[str, Any]] = []
    empty: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for queue in figures:
        kind = queue["name"].removeprefix(f"{federation}.").partition(".")[0]
        if kind in _QUEUES_OF_WORKERS and not queue["ready"] and not queue["unacknowledged"]:
            empty.setdefault((kind, bool(queue["consumers"])), []).append(queue)
        else:
            shown.append(queue)
    for (kind, _), queues in empty.items():
        shown += queues if len(queues) <= _MAX_EMPTY_ROWS else [_combined(kind, queues, federation)]
    return shown


def _combined(kind: str, queues: Sequence[Mapping[str, Any]], federation: str) -> Mapping[str, Any]:
    return {
        **queues[0],
        "name": f"{federation}.{kind}.* ({len(queues)} empty)",
        "purpose": f"{len(queues)} empty queues of this kind",
        "consumers": sum(queue["consumers"] for queue in queues),
        "size_bytes": sum(queue["size_bytes"] or 0 for queue in queues),
    }


def ending(event: RunEvent | None) -> str:
    """Return how a run ended, as a sentence; None means that it was interrupted."""
    match event:
        case run_events.Finished(reason=reason) | run_events.Stopped(reason=reason):
            return f"{event.name}: {reason or ''}"
    return "interrupted; the same command (without --fresh) continues the run"


def curves(view: RunView) -> dict[str, Any]:
    """Return the measured values by round: one list per metric, each as long as ``rounds``.

    The training loss is only in reports: a live page knows it only since the run was resumed.
    """
    points = []
    for each in view.done:
        loss = weighted_mean(each.train_losses) if view.whole else None
        values = _metrics(each) | {
            "loss": each.loss, "epsilon": each.epsilon, "training loss": loss,
        }  # fmt: skip
        values = {name: value for name, value in values.items() if value is not None}
        if values:
            points.append((each.number, values))
    measured = {name for _, values in points for name in values}
    first = [name for name in ("loss", "training loss", "epsilon") if name in measured]
    others = sorted(measured - set(first), key=lambda name: (name != "accuracy", name))
    names = [*first, *others[: None if view.whole else _MAX_METRICS]]
    return {
        "rounds": [number for number, _ in points],
        **{name: [values.get(name) for _, values in points] for name in names},
    }


def staleness(view: RunView) -> dict[str, Any] | None:
    """Return how stale the updates were and what that cost; None if all were fresh.

    Returns:
        ``counts``, the number of updates by staleness, and ``lost``, the share of the examples'
        total weight that the discount took away, from 0 to 1; None if no update has a weight.
    """
    updates = [update for each in view.detailed for _, update in each.answers.values()]
    if not any(update.staleness for update in updates):
        return None
    # A fresh update has no staleness and no weight in the history: 0, and its number of examples.
    counts = Counter(update.staleness or 0 for update in updates)
    weighed = [
        (update.num_examples if update.weight is None else update.weight, update.num_examples)
        for update in updates
        if update.num_examples is not None and (update.weight is not None or not update.staleness)
    ]
    lost = None
    if any(update.weight is not None for update in updates):
        examples = sum(full for _, full in weighed)
        if examples:
            lost = max(0.0, sum(full - weight for weight, full in weighed) / examples)
    return {
        "counts": {str(versions): counts[versions] for versions in sorted(counts)},
        "lost": lost,
    }


def rejected(view: RunView) -> dict[str, Any]:
    """Return the latest rejected messages, the counts by cause, and the total."""
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
    # A history describes only the first of many rejections, but counts all.
    total = max(sum(view.causes.values()), sum(each.rejected for each in view.done))
    return {"latest": latest, "causes": dict(view.causes), "total": total}


def latest(view: RunView, metric: str) -> float | None:
    """Return the newest value of a metric or of ``loss``; None if there is none."""
    for each in reversed(view.done):
        value = each.loss if metric == "loss" else _metrics(each).get(metric)
        if value is not None:
            return float(value)
    return None


def _round(view: RoundView) -> dict[str, Any]:
    row: dict[str, Any] = {"round": view.number}
    if view.committed_at is not None:
        updates, counted = [update for _, update in view.answers.values()], set(view.participants)
        examples = Counter[str]()  # an asynchronous round can count a worker more than once
        for update in updates:
            examples[update.worker or ""] += update.num_examples or 0
        row |= {
            "updates": max(len(updates), len(counted)),
            "participants": list(view.participants),
            "examples": [examples[name] or None for name in view.participants],
            "asked": [name for name in view.asked if name not in counted],
            "came_late": sorted(view.came_late),
            "opened_at": view.asked_at,
            "committed_at": view.committed_at,
            "num_examples": view.num_examples,
            "bytes": sum(update.bytes or 0 for update in updates),
            "train_loss": weighted_mean(view.train_losses),
            "phases": view.phases,
            "late": view.late,
            "rejected": view.rejected,
        }
    if view.evaluated:
        row |= {"loss": view.loss, "evaluated_on": view.evaluated_on}
    if view.evaluated or view.metrics:
        row["metrics"] = _metrics(view)
    return row


def _metrics(view: RoundView) -> dict[str, float]:
    return {
        clipped(name, 64): value
        for name, value in view.metrics.items()
        if name not in ("loss", "rounds")
    }


def _worker(row: WorkerView) -> dict[str, Any]:
    names = (
        "name", "state", "why", "num_examples", "round", "step", "steps", "loss", "heartbeat_s",
        "last_seen", "counted", "late", "rejected", "bytes",
    )  # fmt: skip
    train_s = row.train_s / row.trained if row.trained else None
    fields = {name: getattr(row, name) for name in names}
    return {**fields, "train_s": train_s}
