"""What is known of one round, from its events or its history. Pure; part of ``RunView``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.metric_names import add_test_prefix

_MAX_NOTES = 1000
_MAX_ALIKE = 5  # notes of one kind about one worker, which can repeat itself at any rate
_MAX_FAILURES = 10_000
_CENTURY_S = 3.2e9  # a longer deadline may have no calendar date

PHASES = ("waiting", "training", "transfer", "aggregation", "checkpoint")
"""The phases of the time between two commits; see ``RoundView.phases``."""

_NO_METRIC = {"loss", "epsilon", "delta"}  # the floats in a history line that are not metrics
# The fields of ``Counted`` that a history has, under the same names.
_IN_HISTORY = ("worker", "num_examples", "bytes", "staleness", "weight")


@dataclass(frozen=True)
class Note:
    """An event of a round that counts no update.

    ``unlisted`` is the number of similar events before it that have no note.
    """

    at: float
    event: RunEvent
    unlisted: int = 0

    @property
    def worker(self) -> str | None:
        """The worker that the event is about; None if it names none."""
        return getattr(self.event, "worker", None) or None

    @property
    def reason(self) -> str:
        """The reason in the event; "" if it has none."""
        return getattr(self.event, "reason", None) or ""


@dataclass
class RoundView:
    """What is known of a round; None means unknown.

    ``answers`` are the updates that were counted, and when. ``train_losses`` has the number of
    examples and the training loss of each; only a history tells them. ``needed`` is the current
    quorum, which falls when a worker that was asked leaves. ``deadline_at`` is postponed by an
    outage, as in the coordinator. ``late`` and ``rejected`` count the messages that arrived while
    the round was open; ``came_late`` names the workers whose update of this round arrived after its
    commit.
    """

    number: int
    opened_at: float | None = None
    asked_at: float | None = None  # when it was opened or last reopened
    asked: tuple[str, ...] = ()
    needed: int | None = None
    deadline_at: float | None = None
    openings: int = 0  # above 1 if a coordinator was restarted while the round was open
    restarted_at: float | None = None  # when it was restarted; None once the round is open again
    answers: dict[str, tuple[float, run_events.Counted]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rejections: dict[str, Note] = field(default_factory=dict)  # of the last update of a worker
    listed: dict[tuple[str, str | None, int], Note] = field(default_factory=dict)
    joined: dict[str, float] = field(default_factory=dict)  # while the round was open
    came_late: set[str] = field(default_factory=set)
    late: int = 0
    rejected: int = 0
    committed_at: float | None = None
    participants: tuple[str, ...] = ()
    num_examples: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None  # the privacy budget used by all rounds so far
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    train_losses: tuple[tuple[int, float], ...] = ()
    evaluated_on: int | None = None
    evaluated: bool = False

    def answer_key(self, worker: str, updates: int) -> str:
        """Return the key of a worker's answer in ``answers``.

        An asynchronous round can count a worker more than once. Later keys then contain
        ``updates``, the number of counted updates, this one included.
        """
        again = worker in self.answers and updates > len(self.answers)
        return f"{worker} ({updates})" if again else worker

    @property
    def is_done(self) -> bool:
        """Whether the round has a result."""
        return self.committed_at is not None or self.evaluated

    @property
    def is_open(self) -> bool:
        """Whether the round still waits for updates."""
        return self.opened_at is not None and self.committed_at is None

    @property
    def is_suspended(self) -> bool:
        """Whether a coordinator was restarted and has not opened the round again yet."""
        return self.is_open and self.restarted_at is not None

    def add(self, at: float, event: RunEvent) -> None:
        """Apply an event that names this round."""
        match event:
            case run_events.Opened():
                self._open(at)
                self._ask(at, event)
            case run_events.Reopened():
                self.note(at, event)
                self.opened_at = self.opened_at or at
                self._ask(at, event)
            case run_events.Counted():
                self._count(at, event)
            case run_events.Committed(num_examples=num_examples, timings=timings):
                self.committed_at, self.participants = at, event.participants or ()
                self.num_examples, self.timings = num_examples, timings or {}
            case run_events.Evaluated(loss=loss, num_examples=num_examples):
                self.evaluated, self.loss, self.evaluated_on = True, loss, num_examples
                self.metrics = {**self.metrics, **(event.metrics or {})}
            case run_events.Personal(metrics=metrics):
                self.metrics = {**self.metrics, **(metrics or {})}
            case run_events.Tested(metrics=metrics):
                self.metrics = {**self.metrics, **add_test_prefix(metrics or {})}
            case run_events.Privacy(epsilon=epsilon):
                self.epsilon = epsilon
            case _:
                self._add_note(at, event)

    def _add_note(self, at: float, event: RunEvent) -> None:
        self.note(at, event)
        match event:
            case run_events.Quorum(needed=needed):
                self.needed = needed or self.needed
            case run_events.Late(worker=worker):
                self.came_late.add(worker or "")
            case run_events.Failure(worker=worker, reason=reason):
                if len(self.failures) < _MAX_FAILURES:
                    self.failures[worker or ""] = reason or ""

    def _open(self, at: float) -> None:
        if self.openings and self.restarted_at is None:  # the restart is not in the journal
            self.answers = {}
        self.openings += 1
        self.opened_at, self.restarted_at, self.committed_at = at, None, None

    def _ask(self, at: float, event: run_events.Opened | run_events.Reopened) -> None:
        self.asked, self.needed, self.asked_at = event.asked or (), event.needed, at
        self.failures, self.rejections, self.joined = {}, {}, {}
        self.deadline_at = None
        if event.deadline_s is not None and 0 <= event.deadline_s < _CENTURY_S:
            self.deadline_at = at + event.deadline_s

    def _count(self, at: float, event: run_events.Counted) -> None:
        worker = event.worker or ""
        self.answers[self.answer_key(worker, event.updates or 0)] = at, event
        self.failures.pop(worker, None)
        self.rejections.pop(worker, None)
        self.needed = event.needed or self.needed

    def restart(self, at: float) -> None:
        """Forget the answers of a round that is not on disk, since a coordinator was restarted.

        The broker delivers these updates again, and they may be counted before the next opening.
        """
        self.restarted_at, self.deadline_at, self.answers = at, None, {}

    def take_back(self) -> None:
        """Forget the result: the run has gone back to an earlier checkpoint."""
        self.committed_at, self.participants, self.num_examples = None, (), None
        self.timings, self.metrics, self.epsilon = {}, {}, None
        self.evaluated, self.loss, self.evaluated_on = False, None, None

    def reject(self, at: float, event: run_events.Rejected) -> None:
        """Keep the rejection of a worker's update; other messages change nothing."""
        # A message that cannot be decoded has no kind, and may be an update.
        if event.worker and event.kind in (None, "update") and len(self.rejections) < _MAX_FAILURES:
            self.rejections[event.worker] = Note(at, event)

    @property
    def notes(self) -> list[Note]:
        """The notes, in order: of similar ones, the first few and the newest."""
        return list(self.listed.values())

    def note(self, at: float, event: RunEvent) -> None:
        """Add an event to the notes."""
        worker, number = Note(at, event).worker, 1
        while number < _MAX_ALIKE and (event.name, worker, number) in self.listed:
            number += 1
        earlier = self.listed.pop((event.name, worker, number), None)
        if earlier is None and len(self.listed) >= _MAX_NOTES:
            del self.listed[next(iter(self.listed))]
        unlisted = 0 if earlier is None else earlier.unlisted + 1
        self.listed[event.name, worker, number] = Note(at, event, unlisted)

    def drop_details(self) -> None:
        """Keep only the result, to bound the memory of old rounds."""
        self.answers, self.train_losses, self.listed, self.joined = {}, (), {}, {}
        self.failures, self.rejections = {}, {}
        self.asked, self.came_late = (), set()

    def after_s(self, at: float) -> float | None:
        """Return the seconds from the opening to a time; 0 if it was earlier, None if unknown."""
        # Differences of such large numbers have no exact sub-microseconds.
        return None if self.opened_at is None else max(0.0, round(at - self.opened_at, 6))

    @property
    def phases(self) -> dict[str, float] | None:
        """The time from the previous commit to this one in seconds, by phase; None if unknown.

        The path of the last counted update determines the length of a round: training (as its
        worker measured it), transfer, aggregation. Transfer is what remains of the time, so it
        includes the worker's evaluation and the wait for earlier updates at the coordinator. Time
        after the last counted update counts as waiting.

        Example:
            >>> answers = {"a": (108.0, run_events.Counted(worker="a", train_s=6.0))}
            >>> timings = {"waiting_s": 1, "open_s": 10, "fold_s": 1, "average_s": 1}
            >>> list(RoundView(1, 100.0, answers=answers, timings=timings).phases.values())
            [3.0, 6.0, 1.0, 2.0, 0.0]
        """
        if not self.timings:
            return None
        waiting_s, open_s, fold_s, average_s, checkpoint_s = (
            float(self.timings.get(f"{step}_s", 0.0))
            for step in ("waiting", "open", "fold", "average", "checkpoint")
        )
        timed = ((self.after_s(at), update.train_s) for at, update in self.answers.values())
        after_s, train_s = max(
            ((a, t or 0.0) for a, t in timed if a is not None), default=(open_s, 0.0)
        )
        # The journal and the history read the clock at slightly different times.
        after_s = min(open_s, after_s)
        training_s = min(after_s, train_s)
        folding_s = min(after_s - training_s, fold_s)
        seconds = (
            waiting_s + open_s - after_s, training_s, after_s - training_s - folding_s,
            folding_s + average_s, checkpoint_s,
        )  # fmt: skip
        return dict(zip(PHASES, seconds, strict=True))


def remembered(row: Mapping[str, Any]) -> RoundView:
    """Return the view of a round in a history, given its row of ``history.read_history``.

    That has checked the fields. A row without participants is of a model that was only evaluated.
    """
    view = RoundView(row["round"])
    if "participants" in row:
        opened_at = datetime.fromisoformat(row["opened_at"]).timestamp()
        view.opened_at = view.asked_at = opened_at
        view.committed_at = datetime.fromisoformat(row["committed_at"]).timestamp()
        view.asked = tuple(row["asked"])
        participants = row["participants"]
        for number, participant in enumerate(participants, start=1):
            key = view.answer_key(participant["worker"], number)
            update = run_events.Counted(
                train_s=participant["seconds"],
                **{name: participant.get(name) for name in _IN_HISTORY},
            )
            view.answers[key] = opened_at + participant["counted_s"], update
        view.participants = tuple(dict.fromkeys(each["worker"] for each in participants))
        view.num_examples = sum(each["num_examples"] for each in participants)
        losses = ((each["num_examples"], each["train_loss"]) for each in participants)
        view.train_losses = tuple((n, loss) for n, loss in losses if loss is not None)
        view.timings, view.epsilon = row["timings"], row.get("epsilon")
        view.late, view.rejected = row["late"], row["rejected"]
    if "loss" in row:
        view.evaluated, view.loss, view.evaluated_on = True, row["loss"], row["num_examples"]
    view.metrics = metrics_of(row)
    return view


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in a row of a history, without its other fields.

    Example:
        >>> metrics_of({"round": 3, "late": 0, "loss": 0.5, "accuracy": 0.75})
        {'accuracy': 0.75}
    """
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, float) and name not in _NO_METRIC
    }


def late_updates(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, str]]:
    """Yield the round and worker of each late update, which is listed in a later round's row."""
    for row in rows:
        for update in row.get("late_updates", ()):
            yield update["round"], update["worker"]
