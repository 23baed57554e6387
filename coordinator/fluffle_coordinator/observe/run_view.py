"""The one fold from events to what a run looks like: its rounds, workers and outcome.

``explain``, the live page, the report and the metrics all render a ``RunView``. It is pure: times,
in seconds since 1970, come from the events. A journal may begin anywhere and come from another
version of fluffle, so missing facts are None and nothing raises. An event costs O(open rounds), and
memory is bounded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fluffle_common.errors import CAUSES
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent, from_fields
from fluffle_coordinator.observe.round_view import RoundView, late_updates, remembered
from fluffle_coordinator.observe.worker_view import Workers

_MAX_ROUNDS = 2000
_MAX_DETAILED = 50  # older rounds keep only their result
_MAX_REJECTIONS = 30

# The events that create the view of their round; the others may come from messages that name any.
_CREATES_ROUND = (
    run_events.Opened | run_events.Reopened | run_events.Counted | run_events.Committed
    | run_events.MeasuredEvent | run_events.Privacy
)  # fmt: skip
_PHASE_AFTER: dict[type[RunEvent], str] = {
    run_events.Standby: "standby",
    run_events.Started: "waiting",
    run_events.Resumed: "waiting",
    run_events.Opened: "open",
    run_events.Reopened: "open",
    run_events.Closed: "committing",
    run_events.Committed: "waiting",
    run_events.Finished: "ended",
    run_events.Stopped: "ended",
    run_events.Interrupted: "ended",
}


OUTCOMES = ("counted", "late", "rejected", "duplicate")
STEPS = ("waiting", "open", "fold", "average", "checkpoint")
"""The steps of a round; the ``timings`` of a committed round call them ``<step>_s``."""


@dataclass
class Counters:
    """Counters of a federation, from the first event seen and across runs.

    They never decrease, as Prometheus requires of counters. ``outcomes`` counts updates, and
    ``causes`` all rejected messages.
    """

    rounds: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    outages: int = 0
    update_bytes: int = 0
    step_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    step_rounds: Counter[str] = field(default_factory=Counter)

    def add(self, event: run_events.RunEvent) -> None:
        """Count an event."""
        match event:
            case run_events.Counted(bytes=size):
                self.outcomes[event.name] += 1
                self.update_bytes += size or 0
            case run_events.Late() | run_events.Duplicate():
                self.outcomes[event.name] += 1
            case run_events.Rejected(kind=kind):
                self.causes[cause_of(event)] += 1
                if kind in (None, "update"):  # a message that cannot be decoded may be an update
                    self.outcomes[event.name] += 1
            case run_events.Failure():
                self.failures += 1
            case run_events.Disconnected():
                self.outages += 1
            case run_events.Committed(timings=timings):
                self.rounds += 1
                for step in STEPS:
                    if timings and f"{step}_s" in timings:
                        self.step_seconds[step] += timings[f"{step}_s"]
                        self.step_rounds[step] += 1


def cause_of(event: run_events.Rejected) -> str:
    """Return the cause of a rejection; ``malformed`` if it is not one of ``CAUSES``."""
    return event.cause if event.cause in CAUSES else "malformed"


class RunView:
    """A run, folded from its events or its history.

    If it is ``whole``, it keeps every round with all details, not only the latest.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole
        self.run: str | None = None
        self.planned: int | None = None  # the number of rounds that the run is to have
        self.phase = "waiting"  # or another value in ``_PHASE_AFTER``
        self.rounds: dict[int, RoundView] = {}
        self.before = RoundView(0)  # what happened before the first round
        self.workers = Workers()
        self.counters = Counters()  # across runs
        self.causes: Counter[str] = Counter()  # of all rejected messages
        # The latest of them, as (time, open round or 0, event).
        self.rejections: deque[tuple[float, int, run_events.Rejected]] = deque(
            maxlen=None if whole else _MAX_REJECTIONS
        )
        # When and for what the coordinator last reported to wait.
        self.waiting: tuple[float, run_events.Waiting] | None = None
        # Since when and why the coordinator cannot write.
        self.full_disk: tuple[float, run_events.Disk] | None = None
        self.ended: tuple[float, RunEvent] | None = None  # when and how
        self.unlinked_since: float | None = None  # when the coordinator lost the broker
        self._blocked_since: float | None = None
        self._open: dict[int, RoundView] = {}

    def add(self, at: float, event: RunEvent, run: str | None = None) -> None:
        """Apply an event; ``run`` is its run, if it does not name that itself."""
        run = getattr(event, "run", None) or run
        if run and run != self.run:
            self._begin(run)
        self.phase = _PHASE_AFTER.get(type(event), self.phase)
        self.workers.add(at, event)
        self.counters.add(event)
        self._add_to_run(at, event)
        if isinstance(event, run_events.Disk):
            self.full_disk = (at, event)
        elif isinstance(event, run_events.Counted | run_events.Committed):
            self.full_disk = None  # this is what had waited for the disk
        if isinstance(event, run_events.RoundEvent):
            find = self._round if isinstance(event, _CREATES_ROUND) else self._known
            self._add_to_round(find(event.round), at, event)

    def remember(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Apply the rows of a history (``read_history``); they do not change ``counters``."""
        rows = sorted(rows, key=lambda row: row["round"])
        rejections = []
        forgotten = 0 if self.whole else max(0, len(rows) - _MAX_ROUNDS)
        for place, row in enumerate(rows):
            view = remembered(row)
            if place >= forgotten:
                self._round(view.number)  # makes room
                self.rounds[view.number] = view
            about = view.committed_at or 0.0, view.number
            rejections += [(*about, fields) for fields in row.get("rejections", ())]
            for name in view.asked:
                self.workers.remember(name)
            for _, update in view.answers.values():
                worker = self.workers.remember(update.worker or "")
                worker.count(update.num_examples, update.bytes, update.train_s)
        for number, name in late_updates(rows):
            self.workers.remember(name).late += 1
            if number in self.rounds:
                self.rounds[number].came_late.add(name)
        # Last, because a rejected message counts only for a known worker.
        for at, number, fields in rejections:
            event = from_fields(run_events.Rejected.name, fields)
            self.workers.add(at, event)
            self._reject(at, number, event)
        if not self.whole:
            for number in sorted(self.rounds)[:-_MAX_DETAILED]:
                self.rounds[number].drop_details()

    def _reject(self, at: float, during: int, event: RunEvent) -> None:
        if isinstance(event, run_events.Rejected):
            self.causes[cause_of(event)] += 1
            self.rejections.append((at, during, event))

    @property
    def done(self) -> list[RoundView]:
        """The rounds that have a result, in order."""
        return [self.rounds[n] for n in sorted(self.rounds) if self.rounds[n].is_done]

    @property
    def detailed(self) -> list[RoundView]:
        """The latest rounds that have a result, which still have all details."""
        return self.done if self.whole else self.done[-_MAX_DETAILED:]

    @property
    def open(self) -> RoundView | None:
        """The open round; None if there is none."""
        return next(reversed(self._open.values()), None)

    @property
    def committed(self) -> int:
        """The number of the last committed round; 0 if there is none."""
        committed = (n for n, view in self.rounds.items() if view.committed_at is not None)
        return max(committed, default=0)

    @property
    def next(self) -> int:
        """The number after that of the last round with a result."""
        return max((n for n, view in self.rounds.items() if view.is_done), default=0) + 1

    def _begin(self, run: str) -> None:
        if self.run is not None:
            self.rounds, self._open, self.planned = {}, {}, None
            self.causes.clear()
            self.rejections.clear()
            self.workers.clear()  # those that are connected join the new run
        self.run = run

    def _add_to_run(self, at: float, event: RunEvent) -> None:
        """Apply what an event says about the run and about all open rounds."""
        match event:
            case run_events.Started() | run_events.Resumed():
                self._start(at, event)
            case run_events.Connected() | run_events.Reconnected():
                self._postpone_deadlines(self.unlinked_since, at)
                self.unlinked_since = None
            case run_events.Disconnected():
                self._unblock(at)
                self.unlinked_since = at if self.unlinked_since is None else self.unlinked_since
            case run_events.Blocked():
                self._blocked_since = at if self._blocked_since is None else self._blocked_since
            case run_events.Unblocked():
                self._unblock(at)
            case run_events.Waiting():
                self.waiting = (at, event)
            case run_events.Finished() | run_events.Stopped() | run_events.Interrupted():
                self.ended, self.waiting = (at, event), None
            case run_events.Joined(worker=worker):
                self._join(at, worker or "")
            case run_events.Left(worker=worker) | run_events.Gone(worker=worker):
                self._depart(worker or "")
            case run_events.Late() if self.rounds:
                (self.open or self.rounds[max(self.rounds)]).late += 1
            case run_events.Rejected():
                self._add_rejected(at, event)
            case run_events.Refused() | run_events.Resend() | run_events.FrozenDiffers():
                self._note_in_open(at, event)

    def _start(self, at: float, event: run_events.Started | run_events.Resumed) -> None:
        """Apply the start of a coordinator, which does not know any worker yet."""
        self.planned = event.rounds or self.planned
        committed = event.round if isinstance(event, run_events.Resumed) else 0
        for number, view in self.rounds.items():
            is_lost = committed is not None and number > committed
            if is_lost:
                view.take_back()
            if is_lost or view.is_open:
                view.restart(at)
        self.workers.begin_coordinator(at)
        self.waiting = self.full_disk = self.ended = None
        self.unlinked_since = self._blocked_since = None

    def _unblock(self, at: float) -> None:
        self._postpone_deadlines(self._blocked_since, at)
        self._blocked_since = None

    def _postpone_deadlines(self, since: float | None, at: float) -> None:
        for view in self._open.values():
            if view.deadline_at is not None and since is not None:
                view.deadline_at += max(at - since, 0.0)

    def _join(self, at: float, worker: str) -> None:
        self.before.failures.pop(worker, None)
        for view in self._open.values():
            view.failures.pop(worker, None)  # a restarted worker gets the work again
            view.rejections.pop(worker, None)
            if worker not in view.asked:
                view.joined[worker] = at

    def _depart(self, worker: str) -> None:
        for view in self._open.values():
            view.joined.pop(worker, None)

    def _add_rejected(self, at: float, event: run_events.Rejected) -> None:
        current = self.open
        if current is not None:
            current.rejected += 1
        self._reject(at, current.number if current else 0, event)
        self._note_in_open(at, event)
        view = current if event.round is None else self._known(event.round)
        if view is not None:
            view.reject(at, event)

    def _note_in_open(self, at: float, event: RunEvent) -> None:
        """Note an event in its own round, if it names one, and in every open round."""
        views = dict(self._open)
        if view := self._known(getattr(event, "round", None)):
            views[view.number] = view
        if not self.rounds:
            views[0] = self.before
        for view in views.values():
            view.note(at, event)

    def _add_to_round(self, view: RoundView | None, at: float, event: RunEvent) -> None:
        if view is None:
            return
        view.add(at, event)
        if isinstance(event, run_events.Opened) or not view.is_open:
            self._open.pop(view.number, None)
        if view.is_open:
            self._open[view.number] = view  # the last one is the one opened last
        if isinstance(event, run_events.Opened | run_events.Committed):
            self.waiting = None
        if isinstance(event, run_events.Committed) and not self.whole:
            for number in sorted(self.rounds)[-_MAX_DETAILED - 2 : -_MAX_DETAILED]:
                self.rounds[number].drop_details()

    # --- the rounds that are kept --------------------------------------------------------------

    def _round(self, number: int | None) -> RoundView | None:
        """Return the round of this number, new if it is unknown; None without a number."""
        if number is None:
            return None
        if number not in self.rounds and len(self.rounds) >= _MAX_ROUNDS and not self.whole:
            oldest = min(self.rounds)
            del self.rounds[oldest]
            self._open.pop(oldest, None)
        return self.rounds.setdefault(number, RoundView(number))

    def _known(self, number: int | None) -> RoundView | None:
        """Return the round of this number, unless it is unknown and nobody has asked for it."""
        if number == 0:
            return self.before
        return self._round(number) if number in self.rounds or self.whole else None
