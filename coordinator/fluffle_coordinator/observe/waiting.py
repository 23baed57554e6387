"""Describes what a run waits for and what each missing worker is doing. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fluffle_common.plural import MOST_NAMES, listed, plural
from fluffle_common.protocol.events import Doing, Waiting
from fluffle_coordinator.machine.clock import standstill_s
from fluffle_coordinator.machine.closing import deadline_at
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.observe.times import duration


class WaitingReport:
    """Decides when to report what a run waits for: on a change, and every ``every_s`` seconds."""

    def __init__(self, every_s: float, now: float) -> None:
        self.due_at = now + every_s
        self._every_s = every_s
        self._kind: tuple[str | None, ...] = ()  # of the last report
        self._inputs: tuple[object, ...] = ()  # the part of the state that can change the report

    def due(self, state: State, now: float, *, had_effects: bool) -> Waiting | None:
        """Return the report that is due now, if any.

        If the machine ``had_effects`` just now, its own events say more than this report, which
        then waits until its interval is over.
        """
        inputs = state.phase is Phase.WAITING, state.round, len(state.workers), state.init_asked
        if inputs == self._inputs and now < self.due_at:
            return None
        if inputs[:2] != self._inputs[:2]:
            # A round has just opened: that event says enough, unless workers are lacking.
            is_short = state.phase is Phase.OPEN and _short(state) > 0
            self.due_at = now if is_short else now + self._every_s
        self._inputs = inputs
        what = _lacking(state) if state.link and state.phase is Phase.WAITING else None
        kind: tuple[str | None, ...] = ()
        if what is not None:
            kind = what, state.init_asked if what == "first_weights" else None
        if kind == self._kind and now < self.due_at:
            return None  # before the report, which names every worker, is put together
        waiting = waiting_for(state, now)
        if waiting is not None and had_effects and now < self.due_at:
            return None
        self.due_at, self._kind = now + self._every_s, kind
        return waiting


def waiting_for(state: State, now: float) -> Waiting | None:
    """Return what the run waits for and who is missing; None if it waits for nothing."""
    if not state.link:
        return None
    if state.phase is Phase.WAITING:
        return _before_a_round(state)
    if state.phase is Phase.OPEN:
        silent_s = standstill_s(state, now)
        left_s = max(0.0, deadline_at(state) + silent_s - now)
        left = f"{left_s:.0f} s" if left_s < 60 else duration(left_s)
        left += " to the deadline"
        if silent_s > 0:
            left += f", which is paused: the broker has delivered no heartbeat for {silent_s:.0f} s"
        return Waiting(
            reason=f"round {state.round}: {state.folded} of {state.needed} updates, {left}; "
            f"{missing(state, now)}",
            what="updates",
            round=state.round,
            missing=tuple(_doings(state, now)),
            short=_short(state),
        )
    if state.phase is Phase.EVALUATING and not state.evaluate_pending:
        reason = f"the run is done; waiting to inform {listed(state.unheard)}"
        return Waiting(reason=reason, what="workers")
    if state.phase is Phase.EVALUATING:
        names = listed(sorted(n for n in state.asked if n not in state.evaluations))
        reason = f"waiting for the evaluation by {names or 'a worker, but no worker is connected'}"
        return Waiting(reason=reason, what="evaluations")
    return None


def missing(state: State, now: float) -> str:
    """Return a sentence part about what each worker that has not answered is doing.

    Of many workers, it names the first few and counts the others by their state.
    """
    doings = list(_doings(state, now))
    parts = [f"{doing.worker} {doing.sentence()}" for doing in doings[:MOST_NAMES]]
    if others := doings[MOST_NAMES:]:
        parts.append(f"and {len(others):,} more ({', '.join(_by_state(others))})")
    return ", ".join(parts + _more_needed(state)) or "all have answered"


def _by_state(doings: Iterable[Doing]) -> list[str]:
    return [f"{count:,} {state}" for state, count in Counter(d.state for d in doings).items()]


def in_brief(state: State, now: float) -> str:
    """Return what the run waits for, in a few words, without the workers' names."""
    match state.phase:
        case Phase.WAITING if not state.has_enough_workers:
            return f"workers: {len(state.workers)} of {state.workers_for_quorum} connected"
        case Phase.OPEN:
            parts = _by_state(_doings(state, now)) + _more_needed(state)
            return f"round {state.round}: {', '.join(parts)}"
        case Phase.EVALUATING if not state.evaluate_pending:
            return f"workers to inform: {len(state.unheard)}"
        case Phase.EVALUATING:
            return f"evaluations: {len(state.evaluations)} of {len(state.asked)}"
        case _:
            return ""


def _more_needed(state: State) -> list[str]:
    short = _short(state)
    return [f"{plural(short, 'more worker')} needed"] if short else []


def _before_a_round(state: State) -> Waiting | None:
    what = _lacking(state)
    if what == "workers":
        present, needed = listed(sorted(state.workers)) or "nobody", state.workers_for_quorum
        reason = f"waiting for workers: {len(state.workers)} of {needed} are connected ({present})"
        reason += state.and_refused
    else:
        reason = f"waiting for first weights from {state.init_asked}"
    return None if what is None else Waiting(reason=reason, what=what)


def _lacking(state: State) -> str | None:
    """Return what the next round lacks, as ``Waiting.what``; None if it can open."""
    if not state.has_enough_workers:
        return "workers"
    return None if state.has_weights else "first_weights"


def _short(state: State) -> int:
    """Return how many more workers the round needs; in continuous schedules, one can suffice."""
    if state.schedule.continuous:
        return 0
    return max(0, state.needed - len(state.asked))


def _doings(state: State, now: float) -> Iterator[Doing]:
    for name in state.missing:
        worker = state.workers.get(name)
        if name in state.failed:
            yield Doing(name, "failed")
        elif worker is None:
            yield Doing(name, "gone")
        elif state.busy(name):
            yield Doing(name, worker.state, worker.step, worker.steps)
        elif worker.state != "idle":  # still busy with an earlier round or receiving this one
            yield Doing(name, worker.state, round=worker.round)
        else:
            yield Doing(name, worker.state, heard_s=max(0.0, now - worker.last_seen))
