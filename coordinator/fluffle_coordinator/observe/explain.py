"""Explains one round of a run from the journal; ``explain_sentences`` turns that into words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import Counted, Doing, RunEvent, Waiting, from_fields
from fluffle_common.protocol.messages import Event
from fluffle_coordinator.observe.round_view import RoundView
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.observe.worker_view import Departure

# The steps from a round's opening to its commit, as the coordinator timed them.
_STEPS = ("open_s", "average_s", "checkpoint_s")
_ROUND_EVENTS = (run_events.Opened, run_events.Counted, run_events.Committed)


class Entry(NamedTuple):
    """An event of the journal, in a quarter of the memory of its message.

    ``moment`` and ``run`` are None if the journal does not tell them.
    """

    moment: datetime | None
    run: str | None
    event: RunEvent

    @classmethod
    def of(cls, message: Event) -> Entry:
        """Return the event in a message of the journal."""
        return cls(message.moment, message.run, from_fields(message.event, message.fields))


class Wait(NamedTuple):
    """The longest wait of a round, in seconds.

    ``until`` is the worker that answered last, if the time from the opening to its answer is the
    longest wait; ``commit``, if that from the last answer to the commit is; "" while the round
    still waits. ``after`` is the worker that answered before; "" if there is none.
    """

    seconds: float
    until: str
    after: str = ""


@dataclass(frozen=True)
class Explanation:
    """A round of a run at time ``now``, in seconds since 1970.

    Round 0 is the time before the first. ``coordinated`` says whether a coordinator is connected
    now; it is None if that is unknown.
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

    @property
    def end(self) -> float:
        """When the round was committed or its run ended; now, if neither."""
        ended = self.view.ended
        return self.round.committed_at or (ended[0] if ended else self.now)

    @property
    def lasted_s(self) -> float | None:
        """The seconds from the opening to the commit; None if one of them is unknown.

        As the coordinator measured them, if it did: its wall clock may have been set meanwhile.
        """
        this = self.round
        if this.opened_at is None or this.committed_at is None:
            return None
        if this.timings.keys() >= set(_STEPS):
            return sum(this.timings[step] for step in _STEPS)
        return max(0.0, _seconds(this.committed_at - this.opened_at))

    @property
    def counted(self) -> list[tuple[float, Counted]]:
        """The answers since the opening, in order; a restart may leave earlier ones."""
        opened_at, answers = self.round.opened_at or 0.0, self.round.answers.values()
        in_round = [(at, update) for at, update in answers if opened_at <= at <= self.end]
        return sorted(in_round, key=lambda answer: answer[0])

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

    @cached_property
    def doings(self) -> dict[str, tuple[float, Doing]]:
        """When and what each worker was last reported to do; without those not reported."""
        if self.view.waiting is None or self.coordinated is False:
            return {}
        at, waiting = self.view.waiting
        return {doing.worker: (at, doing) for doing in waiting.missing or ()}

    @property
    def _last_report(self) -> tuple[float, Waiting] | None:
        """When and for what the coordinator last reported to wait in this round, if it is open."""
        last = self.view.waiting
        return last if last and self.waits and last[1].round == self.round.number else None

    def has_sent(self, worker: str) -> bool:
        """Whether the coordinator last reported that a worker's update is here, if not counted."""
        if self._last_report is None or worker not in self.round.asked:
            return False
        at, waiting = self._last_report
        is_newer = at >= (self.round.asked_at or 0.0)
        return is_newer and waiting.missing is not None and worker not in self.doings

    @property
    def short(self) -> int:
        """How many more workers must join for the quorum, as the coordinator last reported."""
        if self._last_report is None:
            return 0
        at, waiting = self._last_report
        since = sum(joined_at > at for joined_at in self.round.joined.values())
        return max(0, (waiting.short or 0) - since)

    @property
    def waiting(self) -> tuple[float, Waiting] | None:
        """When and for what the coordinator reported to wait, other than the missing workers."""
        if self.view.waiting is None:
            return None
        _, waiting = self.view.waiting
        only_for_workers = waiting.round == self.round.number
        return None if self.round.is_open and only_for_workers else self.view.waiting


def runs_of(journal: Iterable[Entry]) -> dict[str, list[int]]:
    """Return the rounds of each run in the journal, the most recent last."""
    runs: dict[str, dict[int, None]] = {}
    for _, run, event in journal:
        if run is None:
            continue
        rounds = runs.pop(run, {})  # reinserted below, as the most recent
        if isinstance(event, _ROUND_EVENTS) and event.round is not None:
            rounds.pop(event.round, None)
            rounds[event.round] = None
        runs[run] = rounds
    return {run: list(rounds) for run, rounds in runs.items()}


def explain(
    journal: Iterable[Entry],
    run: str,
    number: int,
    now: datetime,
    *,
    coordinated: bool | None = None,
) -> Explanation:
    """Return the explanation of a round, from a journal that begins as early as possible.

    Round 0 is the time before the first round. ``coordinated`` says whether a coordinator is
    connected now; None if that is unknown.
    """
    # Before the first round, a message that names some round must not create it.
    view, now_s = RunView(whole=number > 0), now.timestamp()
    for moment, of, event in journal:
        if moment is not None and of in (run, None):
            at = moment.timestamp()
            now_s = max(now_s, at)  # the coordinator's clock may be ahead of this machine's
            view.add(at, event)
    round_view = view.rounds.get(number) or (RoundView(number) if number else view.before)
    return Explanation(run, view, round_view, now_s, coordinated)


def longest_wait(explanation: Explanation) -> Wait | None:
    """Return the longest wait of a round; None if the round never opened."""
    this, counted = explanation.round, explanation.counted
    if this.opened_at is None:
        return None
    names = ["", *(update.worker or "" for _, update in counted)]
    last_at = counted[-1][0] if counted else this.opened_at
    lasted_s, to_last_s = explanation.lasted_s, _seconds(last_at - this.opened_at)
    if lasted_s is None:
        return Wait(max(0.0, _seconds(explanation.end - last_at)), "", names[-1])
    to_last_s = min(to_last_s, this.timings.get("open_s", lasted_s))  # nothing counts after that
    since_last_s = _seconds(lasted_s - to_last_s)
    if not counted or since_last_s > to_last_s:
        return Wait(since_last_s, "commit", names[-1])
    return Wait(to_last_s, names[-1], names[-2])


def _seconds(difference: float) -> float:
    """Round a difference of times, which are too large for exact sub-microseconds."""
    return round(difference, 6)
