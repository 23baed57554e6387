"""A round, explained: what a view of its run says of it at a moment.

``explain`` looks at one round of a ``RunView``; ``explain_sentences`` puts it into words. What is
not in the journal is not said, and nothing raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fluffle_common.protocol.events import Committed, Counted, Doing, Opened, Waiting, from_fields
from fluffle_common.protocol.messages import Event
from fluffle_coordinator.observe.round_view import Answer, RoundView
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.worker_view import Departure

_ROUNDS_OF = (Opened, Counted, Committed)


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
    # The last two answers, of which both can be one worker's in an asynchronous round.
    last: tuple[Answer, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Explanation:
    """A round of a run at a moment.

    Args:
        run: the run's id.
        view: the run.
        round: the round; number 0 is what was before the first.
        now: the time, in seconds since 1970.
        coordinated: whether a coordinator is connected now; None when that is unknown.
    """

    run: str
    view: RunView
    round: RoundView
    now: float
    coordinated: bool | None = None

    @property
    def is_open(self) -> bool:
        """Whether updates are still waited for."""
        return self.round.is_open

    @property
    def waits(self) -> bool:
        """Whether the round is open and a coordinator may still close it."""
        return self.is_open and self.view.ended is None

    def went(self, worker: str) -> tuple[float, Departure] | None:
        """Return when and how a worker has departed; None when it has not."""
        known = self.view.workers.get(worker)
        return known.went if known else None

    @property
    def missing(self) -> list[str]:
        """Who was asked, or came later and stayed, and has not answered."""
        return sorted({*self.round.asked, *self.round.joined} - self.round.answers.keys())

    @property
    def left_s(self) -> float | None:
        """Seconds to the deadline; negative where it is past."""
        if not self.is_open or self.round.deadline_at is None:
            return None
        return _seconds(self.round.deadline_at - (self.view.unlinked_since or self.now))

    def doing(self, worker: str) -> tuple[float, Doing] | None:
        """Return what a worker was last said to do, and when; None where nothing is known."""
        if self.view.waiting is None or self.coordinated is False:
            return None
        at, waiting = self.view.waiting
        known = {one.worker: one for one in waiting.missing or ()}
        return (at, known[worker]) if worker in known else None

    @property
    def waiting(self) -> tuple[float, Waiting] | None:
        """What the coordinator waits for besides the workers that are missing, since when."""
        if self.view.waiting is None:
            return None
        _, waiting = self.view.waiting
        only_for_them = waiting.round == self.round.number and not waiting.short
        return None if self.is_open and only_for_them else self.view.waiting


def runs_of(events: Iterable[Event]) -> dict[str, list[int]]:
    """Return the runs that the events are of, each with its rounds; the newest come last."""
    runs: dict[str, dict[int, None]] = {}
    for entry in events:
        if entry.run is None:
            continue
        rounds = runs.pop(entry.run, {})  # taken out and put back: the newest comes last
        event = from_fields(entry.event, entry.fields)
        if isinstance(event, _ROUNDS_OF) and event.round is not None:
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
    """Work out what happened in a round.

    Args:
        events: the journal, from as early as possible, in its order.
        run: the run's id.
        number: the round; 0 for what was before the first.
        now: the time, with its zone.
        coordinated: whether a coordinator is connected now; None when that is unknown.
    """
    view = RunView(only=number)
    for entry in events:
        at = entry.moment
        if at is not None and entry.run in (run, None):
            view.add(at.timestamp(), from_fields(entry.event, entry.fields))
    about = view.rounds.get(number) or (RoundView(number) if number else view.before)
    return Explanation(run, view, about, now.timestamp(), coordinated)


def longest_wait(about: Explanation) -> Wait | None:
    """Return what the round waited for longest; None where it never opened."""
    one = about.round
    if one.opened_at is None:
        return None
    ended_at = about.view.ended[0] if about.view.ended else None
    end = one.committed_at or ended_at or about.now
    counted = [answer for answer in one.answers.values() if one.opened_at <= answer.at <= end]
    counted.sort(key=lambda answer: answer.at)
    names = ["", *(answer.worker for answer in counted)]
    last_at = counted[-1].at if counted else one.opened_at
    since_last_s = max(0.0, _seconds(end - last_at))
    if one.committed_at is None:
        return Wait(since_last_s, "", names[-1])
    to_last_s = _seconds(last_at - one.opened_at)
    if not counted or since_last_s > to_last_s:
        return Wait(since_last_s, "commit", names[-1])
    return Wait(to_last_s, names[-1], names[-2], tuple(counted[-2:]))


def _seconds(difference: float) -> float:
    """Return a difference of times without the noise that large floats bring."""
    return round(difference, 6)


def moment(at: float) -> datetime | None:
    """Return a time with its zone; None for one beyond all calendars."""
    try:
        return datetime.fromtimestamp(at, UTC)
    except (OverflowError, OSError, ValueError):
        return None
