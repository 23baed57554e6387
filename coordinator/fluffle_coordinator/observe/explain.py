"""What happened in a round, and what it waits for: worked out from the events of the journal alone.

``explain`` goes over the events in order and keeps what a person would ask about a round.
Everything is taken with care, since a journal may begin anywhere and may have been written by
another version: what is not there is not said, and nothing raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from fluffle_common.protocol.messages import Event


@dataclass(frozen=True)
class Answer:
    """An update that was counted."""

    worker: str
    at: datetime
    num_examples: float | None
    train_s: float | None


@dataclass(frozen=True)
class Note:
    """Something else that happened to the round: ``event`` of the journal, about ``worker``."""

    event: str
    at: datetime
    worker: str | None
    reason: str


@dataclass(frozen=True)
class Wait:
    """What the round waited for longest.

    ``until`` is the worker that answered last, since everyone else's answer was there before it;
    ``commit`` when closing the round took longer; "" while the wait goes on. ``seconds`` are those
    since the opening, for a commit since the last answer, and for a wait that goes on since
    ``after``.
    """

    seconds: float
    until: str
    after: str = ""  # the worker whose update came before; "" where there is none


@dataclass
class Round:
    """What the journal tells of one round.

    ``present`` are the workers that are here as far as is known, ``absent`` those that are not,
    with why. ``needed`` is the quorum of the moment: it falls when someone who was asked goes.
    ``deadline_at`` is put off by an outage, as the coordinator does it; None where it is unknown.
    """

    run: str | None
    number: int
    now: datetime
    opened_at: datetime | None = None
    asked: tuple[str, ...] = ()
    needed: int | None = None
    deadline_at: datetime | None = None
    openings: int = 0  # more than 1: a coordinator was started again while the round was open
    restarted_at: datetime | None = None  # meant until the round is opened again
    answers: dict[str, Answer] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    present: set[str] = field(default_factory=set)
    absent: dict[str, str] = field(default_factory=dict)
    joined: dict[str, datetime] = field(default_factory=dict)  # while the round was open
    committed_at: datetime | None = None
    participants: tuple[str, ...] = ()
    num_examples: float | None = None
    timings: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated_on: float | None = None
    ended: tuple[str, str] | None = None  # finished, stopped or interrupted, and why
    ended_at: datetime | None = None
    coordinated: bool | None = None  # whether a coordinator is connected now; None: unknown
    unlinked_since: datetime | None = None
    waits_for: str = ""  # as the coordinator last said it
    said_at: datetime | None = None

    @property
    def is_open(self) -> bool:
        """Whether updates are still waited for."""
        return self.opened_at is not None and self.committed_at is None

    @property
    def waits(self) -> bool:
        """Whether the round is open and a coordinator may still close it."""
        return self.is_open and self.ended is None

    @property
    def missing(self) -> list[str]:
        """Who was asked, or came later, and has not answered."""
        return sorted({*self.asked, *self.joined} - self.answers.keys())

    @property
    def left_s(self) -> float | None:
        """Seconds to the deadline; negative where it is past."""
        if not self.is_open or self.deadline_at is None:
            return None
        return (self.deadline_at - (self.unlinked_since or self.now)).total_seconds()


def runs_of(events: Iterable[Event]) -> dict[str, list[int]]:
    """Return the runs that the events are of, each with its rounds; the newest come last."""
    runs: dict[str, dict[int, None]] = {}
    for event in events:
        if event.run is None:
            continue
        rounds = runs.pop(event.run, {})  # taken out and put back: the newest comes last
        number = _whole(event.fields, "round")
        if event.event in ("opened", "counted", "committed") and number is not None:
            rounds.pop(number, None)
            rounds[number] = None
        runs[event.run] = rounds
    return {run: list(rounds) for run, rounds in runs.items()}


def explain(
    events: Iterable[Event],
    run: str,
    number: int,
    now: datetime,
    *,
    coordinated: bool | None = None,
) -> Round:
    """Work out what happened in a round.

    Args:
        events: the journal, from as early as possible, in its order.
        run: the run's id.
        number: the round; 0 for what was before the first.
        now: the time, with its zone.
        coordinated: whether a coordinator is connected now; None when that is unknown.
    """
    told = Round(run, number, now, coordinated=coordinated)
    for event in events:
        at = event.moment
        if at is None or event.run not in (run, None):
            continue
        for known in (_WHO_IS_HERE, _OF_THE_RUN):
            if event.event in known:
                known[event.event](told, event.fields, at)
        if _whole(event.fields, "round") == number and event.event in _OF_THE_ROUND:
            _OF_THE_ROUND[event.event](told, event.fields, at)
        elif (told.is_open or not number) and event.event in _OF_ITS_TIME:
            _note(event.event)(told, event.fields, at)
    return told


def longest_wait(told: Round) -> Wait | None:
    """Return what the round waited for longest; None where it never opened."""
    if told.opened_at is None:
        return None
    end = told.committed_at or told.ended_at or told.now
    counted = [one for one in told.answers.values() if told.opened_at <= one.at <= end]
    counted.sort(key=lambda one: one.at)
    names = ["", *(one.worker for one in counted)]
    last_at = counted[-1].at if counted else told.opened_at
    since_last_s = max(0.0, (end - last_at).total_seconds())
    if told.committed_at is None:
        return Wait(since_last_s, "", names[-1])
    to_last_s = (last_at - told.opened_at).total_seconds()
    if not counted or since_last_s > to_last_s:
        return Wait(since_last_s, "commit", names[-1])
    return Wait(to_last_s, names[-1], names[-2])


# --- who is here -------------------------------------------------------------------------------


def _joined(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    worker = _text(fields, "worker")
    told.present.add(worker)
    told.absent.pop(worker, None)
    told.failures.pop(worker, None)  # a process that was started again is asked again
    if told.is_open and worker not in told.asked:
        told.joined[worker] = at


def _gone(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    silent_s = number_in(fields, "silent_s")
    heard = "" if silent_s is None else f" (no heartbeat for {silent_s:.0f} s)"
    _away(told, _text(fields, "worker"), f"has been gone since {clock(at)}{heard}")


def _left(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    reason = _text(fields, "reason")
    _away(told, _text(fields, "worker"), f"left at {clock(at)}{f' ({reason})' if reason else ''}")


def _away(told: Round, worker: str, words: str) -> None:
    told.present.discard(worker)
    told.joined.pop(worker, None)
    told.absent[worker] = words


_Take = Callable[[Round, Mapping[str, Any], datetime], None]
_WHO_IS_HERE: dict[str, _Take] = {"joined": _joined, "gone": _gone, "left": _left}


# --- the run -----------------------------------------------------------------------------------


def _started(told: Round, _: Mapping[str, Any], at: datetime) -> None:
    """Take note that a coordinator has started: it knows of nobody yet."""
    if told.is_open:
        told.restarted_at, told.deadline_at = at, None
    told.present.clear()
    told.absent.clear()
    told.ended = told.ended_at = None
    told.waits_for, told.said_at = "", None
    told.unlinked_since = None


def _connected(told: Round, _: Mapping[str, Any], at: datetime) -> None:
    if told.unlinked_since is not None and told.deadline_at is not None:
        told.deadline_at += max(at - told.unlinked_since, timedelta(0))
    told.unlinked_since = None


def _disconnected(told: Round, _: Mapping[str, Any], at: datetime) -> None:
    if told.unlinked_since is None:
        told.unlinked_since = at


def _waiting(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    told.waits_for, told.said_at = _text(fields, "reason"), at


def _waits_no_more(told: Round, _: Mapping[str, Any], __: datetime) -> None:
    told.waits_for, told.said_at = "", None


def _ended(outcome: str) -> _Take:
    def take(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
        told.ended, told.ended_at = (outcome, _text(fields, "reason")), at
        told.waits_for, told.said_at = "", None

    return take


_OF_THE_RUN: dict[str, _Take] = {
    "started": _started,
    "resumed": _started,
    "connected": _connected,
    "reconnected": _connected,
    "disconnected": _disconnected,
    "waiting": _waiting,
    "opened": _waits_no_more,
    "committed": _waits_no_more,
    "finished": _ended("finished"),
    "stopped": _ended("stopped"),
    "interrupted": _ended("interrupted"),
}


# --- the round ---------------------------------------------------------------------------------


def _opened(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    told.openings += 1
    told.opened_at, told.restarted_at = at, None
    # What was counted before a coordinator was lost comes again, and is counted again.
    told.answers, told.committed_at = {}, None
    _asked(told, fields, at)


def _reopened(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    _note("reopened")(told, fields, at)
    told.opened_at = told.opened_at or at
    _asked(told, fields, at)


def _asked(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    told.asked = _names(fields, "asked")
    told.needed = _whole(fields, "needed")
    told.failures, told.joined = {}, {}
    deadline_s = number_in(fields, "deadline_s")
    told.deadline_at = None
    if deadline_s is not None and 0 <= deadline_s < _A_CENTURY_S:
        told.deadline_at = at + timedelta(seconds=deadline_s)


def _counted(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    worker = _text(fields, "worker")
    numbers = (number_in(fields, "num_examples"), number_in(fields, "train_s"))
    told.answers[worker] = Answer(worker, at, *numbers)
    told.failures.pop(worker, None)
    told.needed = _whole(fields, "needed") or told.needed


def _failure(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    _note("failure")(told, fields, at)
    told.failures[_text(fields, "worker")] = _text(fields, "reason")


def _committed(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
    told.committed_at = at
    told.participants = _names(fields, "participants")
    told.num_examples = number_in(fields, "num_examples")
    told.timings = _numbers(fields.get("timings"))


def _evaluated(told: Round, fields: Mapping[str, Any], _: datetime) -> None:
    told.loss = number_in(fields, "loss")
    told.metrics = _numbers(fields.get("metrics"))
    told.evaluated_on = number_in(fields, "num_examples")


def _note(event: str) -> _Take:
    def take(told: Round, fields: Mapping[str, Any], at: datetime) -> None:
        worker = _text(fields, "worker") or None
        told.notes.append(Note(event, at, worker, _text(fields, "reason")))

    return take


_OF_THE_ROUND: dict[str, _Take] = {
    "opened": _opened,
    "reopened": _reopened,
    "counted": _counted,
    "failure": _failure,
    "committed": _committed,
    "evaluated": _evaluated,
    **{name: _note(name) for name in ("closed", "late", "duplicate", "rejected", "resend")},
}
# These may not name a round; they are told with the round that was open when they happened.
_OF_ITS_TIME = frozenset({"rejected", "refused", "resend"})


# --- fields that may be anything ----------------------------------------------------------------

_A_CENTURY_S = 3.2e9


def number_in(fields: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number; None where there is none under this key."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < float("inf") else None


def clock(at: datetime) -> str:
    """Return the local time of day."""
    return at.astimezone().strftime("%H:%M:%S")


def _whole(fields: Mapping[str, Any], key: str) -> int | None:
    value = number_in(fields, key)
    return value if isinstance(value, int) else None


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    return "" if value is None else str(value)


def _names(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = fields.get(key)
    return tuple(map(str, value)) if isinstance(value, Sequence) and value != str(value) else ()


def _numbers(fields: Any) -> dict[str, float]:
    if not isinstance(fields, Mapping):
        return {}
    found = {str(key): number_in(fields, key) for key in fields}
    return {key: value for key, value in found.items() if value is not None}
