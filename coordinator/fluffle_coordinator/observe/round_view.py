"""A round of a run, as its events or its history tell it. Pure; a part of ``RunView``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fluffle_common.protocol.events import RunEvent

_NOTES = 1000

PHASES = ("waiting", "training", "transfer", "aggregation", "checkpoint")
"""What the time between two commits goes to; see ``RoundView.phases``."""

# What a line of the history says, as floating-point numbers, besides the metrics beside it.
_NO_METRIC = {"loss", "epsilon", "delta"}


@dataclass(frozen=True)
class Answer:
    """An update that was counted.

    ``after_s`` is since the round was last opened or opened again. An asynchronous run tells how
    many versions were committed since the one it was trained from (``staleness``), and how many
    examples it counted with because of that (``weight``).
    """

    worker: str
    at: float
    num_examples: int | None = None
    train_s: float | None = None
    bytes: int | None = None
    after_s: float | None = None
    train_loss: float | None = None
    staleness: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Note:
    """Something else that happened to a round."""

    at: float
    event: RunEvent

    @property
    def worker(self) -> str | None:
        """The worker that it is about; None for the round itself, or nobody known."""
        return getattr(self.event, "worker", None) or None

    @property
    def reason(self) -> str:
        """Why; "" when nothing is said of it."""
        return getattr(self.event, "reason", None) or ""


@dataclass
class RoundView:
    """A round. ``needed`` is the quorum of the moment: it falls when someone who was asked goes.

    ``deadline_at`` is put off by an outage, as the coordinator does it; None when it is unknown.
    ``late`` and ``rejected`` count what came while the round was open; ``came_late`` names those
    whose update of this round came after its commit.
    """

    number: int
    opened_at: float | None = None
    asked_at: float | None = None  # when it was last opened, or opened again
    asked: tuple[str, ...] = ()
    needed: int | None = None
    deadline_at: float | None = None
    openings: int = 0  # more than 1: a coordinator was started again while the round was open
    restarted_at: float | None = None  # meant until the round is opened again
    answers: dict[str, Answer] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    joined: dict[str, float] = field(default_factory=dict)  # while the round was open
    came_late: set[str] = field(default_factory=set)
    late: int = 0
    rejected: int = 0
    committed_at: float | None = None
    participants: tuple[str, ...] = ()
    num_examples: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None  # the privacy spent up to here, when the run accounts for it
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: int | None = None
    evaluated: bool = False

    def place_of(self, worker: str, updates: int) -> str:
        """Return the key of a worker's answer, if it makes so many ``updates``.

        An asynchronous round can count a worker more than once: then it says which one it is.
        """
        again = worker in self.answers and updates > len(self.answers)
        return f"{worker} ({updates})" if again else worker

    @property
    def has_work_of_others(self) -> bool:
        """Whether updates are in it that other rounds asked for, or several of one worker."""
        return any(one.staleness or key != one.worker for key, one in self.answers.items())

    @property
    def is_done(self) -> bool:
        """Whether there is a result of it."""
        return self.committed_at is not None or self.evaluated

    @property
    def is_open(self) -> bool:
        """Whether updates are still waited for."""
        return self.opened_at is not None and self.committed_at is None

    def note(self, at: float, event: RunEvent) -> None:
        """Remember an event that is about the round."""
        if len(self.notes) < _NOTES:
            self.notes.append(Note(at, event))

    def let_go_of_details(self) -> None:
        """Keep the result alone."""
        self.answers, self.notes, self.failures, self.joined = {}, [], {}, {}
        self.asked, self.came_late = (), set()

    @property
    def phases(self) -> dict[str, float] | None:
        """Where the time between the commit before and this one went, in seconds; None if unknown.

        A round is as long as the path of the update that was counted last: it is trained (as its
        worker measured), it travels (this is what remains, so it also holds what a worker does
        besides: the evaluation before it trains, and its turn at the coordinator), and it is added
        up. Time after that update, waiting for others that did not come, counts as waiting.

        Example:
            >>> answers = {"a": Answer("a", 0.0, train_s=6.0, after_s=8.0)}
            >>> timings = {"waiting_s": 1, "open_s": 10, "fold_s": 1, "average_s": 1}
            >>> list(RoundView(1, answers=answers, timings=timings).phases.values())
            [3.0, 6.0, 1.0, 2.0, 0.0]
        """
        if not self.timings:
            return None
        waiting_s, open_s, fold_s, average_s, checkpoint_s = (
            float(self.timings.get(f"{step}_s", 0.0))
            for step in ("waiting", "open", "fold", "average", "checkpoint")
        )
        timed = ((one.after_s, one.train_s) for one in self.answers.values())
        after_s, train_s = max(
            ((a, t or 0.0) for a, t in timed if a is not None), default=(open_s, 0.0)
        )
        # One that was counted before this coordinator resumed, or opened again, is no longer than
        # the round was open.
        after_s = min(open_s, after_s)
        training_s = min(after_s, train_s)
        folding_s = min(after_s - training_s, fold_s)
        spent_s = (
            waiting_s + open_s - after_s, training_s, after_s - training_s - folding_s,
            folding_s + average_s, checkpoint_s,
        )  # fmt: skip
        return dict(zip(PHASES, spent_s, strict=True))


def remembered(row: Mapping[str, Any]) -> RoundView:
    """Return a round of a history, as ``history.read_history`` has it.

    Older histories tell less: what a row does not have is None, or left out, never an error.
    """
    one = RoundView(row["round"])
    if "committed_at" in row or "participants" in row:
        opened_at = epoch_seconds(row.get("opened_at"))
        one.asked_at, one.committed_at = opened_at, epoch_seconds(row.get("committed_at")) or 0.0
        one.asked = tuple(row.get("asked", ()))
        for number, each in enumerate(row.get("participants", ()), start=1):
            one.answers[one.place_of(each["worker"], number)] = _answer(each, opened_at)
        one.participants = tuple(dict.fromkeys(each.worker for each in one.answers.values()))
        one.num_examples = sum(each.num_examples or 0 for each in one.answers.values())
        one.timings = row.get("timings") or {}
        one.late, one.rejected = row.get("late", 0), row.get("rejected", 0)
        one.epsilon = finite(row.get("epsilon"))
    if "loss" in row:
        one.evaluated, one.loss = True, finite(row["loss"])
        one.evaluated_on = row.get("num_examples")
    one.metrics = metrics_of(row)
    return one


def _answer(told: Mapping[str, Any], opened_at: float | None) -> Answer:
    after_s = finite(told.get("counted_s"))
    return Answer(
        told["worker"],
        (opened_at or 0.0) + (after_s or 0.0),
        num_examples=told.get("num_examples"),
        train_s=finite(told.get("seconds")),
        bytes=told.get("bytes"),
        after_s=after_s,
        train_loss=finite(told.get("train_loss")),
        staleness=told.get("staleness"),
        weight=finite(told.get("weight")),
    )


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in a row of a history, where they stand beside its fields.

    Example:
        >>> metrics_of({"round": 3, "late": 0, "loss": 0.5, "accuracy": 0.75})
        {'accuracy': 0.75}
    """
    found = {n: v for n, v in row.items() if isinstance(v, float) and n not in _NO_METRIC}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def late_updates(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, str]]:
    """Yield the round and the worker of each late update; the row that tells it is a later one."""
    for row in rows:
        for one in row.get("late_updates", ()):
            if "worker" in one and isinstance(one.get("round"), int):
                yield one["round"], one["worker"]


def finite(value: Any) -> float | None:
    """Return a number that JSON can carry; None for anything else."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def epoch_seconds(text: Any) -> float | None:
    """Return an ISO 8601 time as seconds since 1970; None when it is none.

    Example:
        >>> epoch_seconds("1970-01-01T00:01:00.500+00:00"), epoch_seconds("soon")
        (60.5, None)
    """
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
