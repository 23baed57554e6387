"""Explains one round of a run from the journal; ``explain_sentences`` turns that into words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fluffle_common.protocol.events import Committed, Counted, Doing, Opened, Waiting, from_fields
from fluffle_common.protocol.messages import Event
from fluffle_coordinator.observe.round_view import Answer, RoundView
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.worker_view import Departure

_ROUND_EVENTS = (Opened, Counted, Committed)


@dataclass(frozen=True)
class Wait:
    """The longest wait of a round.

    Attributes:
        seconds: how long it was: since the opening for a worker's answer, since the last answer
            for the commit, since ``after`` for a wait that continues.
        until: the worker that answered last; ``commit`` if closing the round took longer; "" while
            the wait continues.
        after: the worker that answered before; "" if there is none.
        last: the last two answers; in an asynchronous round, both can come from one worker.
    """

    seconds: float
    until: str
    after: str = ""
    last: tuple[Answer, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Explanation:
    """A round of a run at a point in time.

    Args:
        run: the run's id.
        view: the run.
        round: the round; number 0 is the time before the first.
        now: the time, in seconds since 1970.
        coordinated: whether a coordinator is connected now; None if unknown.
    """

    run: str
    view: RunView
    round: RoundView
    now: float
    coordinated: bool | None = None

    @property
    def waits(self) -> bool:
        """Whether the round is open and a coordinator may still close it."""
        return self.round.is_open and self.view.ended is None

    def departed(self, worker: str) -> tuple[float, Departure] | None:
        """Return when and how a worker has departed; None if it has not."""
        known = self.view.workers.get(worker)
        return known.departed if known else None

    @property
    def missing(self) -> list[str]:
        """The workers that were asked, or joined later and stayed, and have not answered."""
        return sorted({*self.round.asked, *self.round.joined} - self.round.answers.keys())

    @property
    def left_s(self) -> float | None:
        """The seconds to the deadline, negative if it has passed; None if there is none."""
        if not self.round.is_open or self.round.deadline_at is None:
            return None
        return _seconds(self.round.deadline_at - (self.view.unlinked_since or self.now))

    def doing(self, worker: str) -> tuple[float, Doing] | None:
        """Return when and what a worker was last reported to do; None if unknown."""
        if self.view.waiting is None or self.coordinated is False:
            return None
        at, waiting = self.view.waiting
        return next(
            ((at, doing) for doing in waiting.missing or () if doing.worker == worker), None
        )

    @property
    def waiting(self) -> tuple[float, Waiting] | None:
        """When and for what the coordinator reported to wait, other than the missing workers."""
        if self.view.waiting is None:
            return None
        _, waiting = self.view.waiting
        only_for_workers = waiting.round == self.round.number and not waiting.short
        return None if self.round.is_open and only_for_workers else self.view.waiting


def runs_of(events: Iterable[Event]) -> dict[str, list[int]]:
    """Return the rounds of each run that the events belong to, the most recent last."""
    runs: dict[str, dict[int, None]] = {}
    for entry in events:
        if entry.run is None:
            continue
        rounds = runs.pop(entry.run, {})  # reinserted below, as the most recent
        event = from_fields(entry.event, entry.fields)
        if isinstance(event, _ROUND_EVENTS) and event.round is not None:
            rounds.pop(event.round, None)
            rounds[event.round] = None
        runs[entry.run] = rounds
    return {run: list(rounds) for run, rounds in runs.items()}


def explain(
    events: Iterable[Event],
    run: str,
    number: int,
    now: datetime,
    *,
    coordinated: bool | None = None,
) -> Explanation:
    """Return the explanation of a round.

    Args:
        events: the journal, in its order and from as early as possible.
        run: the run's id.
        number: the round; 0 for the time before the first.
        now: the time, with a time zone.
        coordinated: whether a coordinator is connected now; None if unknown.
    """
    view, now_s = RunView(only=number), now.timestamp()
    for entry in events:
        moment = entry.moment
        if moment is not None and entry.run in (run, None):
            at = moment.timestamp()
            now_s = max(now_s, at)  # the coordinator's clock may be ahead of this machine's
            view.add(at, from_fields(entry.event, entry.fields))
    round_view = view.rounds.get(number) or (RoundView(number) if number else view.before)
    return Explanation(run, view, round_view, now_s, coordinated)


def longest_wait(explanation: Explanation) -> Wait | None:
    """Return the longest wait of a round; None if the round never opened."""
    this, ended = explanation.round, explanation.view.ended
    if this.opened_at is None:
        return None
    end = this.committed_at or (ended[0] if ended else explanation.now)
    counted = [answer for answer in this.answers.values() if this.opened_at <= answer.at <= end]
    counted.sort(key=lambda answer: answer.at)
    names = ["", *(answer.worker for answer in counted)]
    last_at = counted[-1].at if counted else this.opened_at
    since_last_s = max(0.0, _seconds(end - last_at))
    if this.committed_at is None:
        return Wait(since_last_s, "", names[-1])
    to_last_s = _seconds(last_at - this.opened_at)
    if not counted or since_last_s > to_last_s:
        return Wait(since_last_s, "commit", names[-1])
    return Wait(to_last_s, names[-1], names[-2], tuple(counted[-2:]))


def _seconds(difference: float) -> float:
    """Round a difference of times, which are too large for exact sub-microseconds."""
    return round(difference, 6)


def moment(at: float) -> datetime | None:
    """Return a time in UTC; None if no calendar date can represent it."""
    try:
        return datetime.fromtimestamp(at, UTC)
    except (OverflowError, OSError, ValueError):
        return None
