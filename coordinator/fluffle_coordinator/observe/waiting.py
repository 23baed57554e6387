"""What a run waits for, and what each missing worker does, as the machine's state has it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from fluffle_common.protocol.events import Doing, Waiting
from fluffle_coordinator.machine.opening import workers_needed
from fluffle_coordinator.machine.state import Phase, State


class WaitingReport:
    """Decides when people are told what a run waits for: if that changes, and every so often.

    Args:
        every_s: how often the same is told again, in seconds.
        now: the time.
    """

    def __init__(self, every_s: float, now: float) -> None:
        self.due_at = now + every_s
        self._every_s = every_s
        self._kind: tuple[str | None, ...] = ()  # of what was told last
        self._looked_at: tuple[object, ...] = ()  # what can change it, at the last look

    def due(self, state: State, now: float, *, just_told: bool) -> Waiting | None:
        """Return what is to be told now, if anything; ``just_told``: something else was."""
        looked_at = state.phase is Phase.WAITING, state.round, len(state.workers), state.init_asked
        if looked_at == self._looked_at and now < self.due_at:
            return None
        if looked_at[:2] != self._looked_at[:2]:  # the opening of a round says enough
            self.due_at = now + self._every_s
        self._looked_at = looked_at
        waiting = waiting_for(state, now) if state.phase is Phase.WAITING else None
        kind: tuple[str | None, ...] = ()
        if waiting is not None:
            kind = waiting.what, state.init_asked if waiting.what == "first_weights" else None
        if kind == self._kind and now < self.due_at:
            return None
        waiting = waiting or waiting_for(state, now)
        if waiting is not None and just_told and now < self.due_at:
            return None  # what was told just now says more; this, when nothing else happens
        self.due_at, self._kind = now + self._every_s, kind
        return waiting


def waiting_for(state: State, now: float) -> Waiting | None:
    """Return what the run waits for and who is missing; None where it waits for nobody."""
    if not state.link:
        return None
    if state.phase is Phase.WAITING:
        return _before_a_round(state)
    if state.phase is Phase.OPEN:
        left_s = max(0.0, state.opened_at + state.rules.deadline_s - now)
        return Waiting(
            reason=f"round {state.round}: {state.folded} of {state.needed} updates, "
            f"{left_s:.0f} s to the deadline; {missing(state, now)}",
            what="updates",
            round=state.round,
            missing=tuple(_doings(state, now)),
            short=_short(state),
        )
    if state.phase is Phase.EVALUATING:
        names = ", ".join(sorted(n for n in state.asked if n not in state.evaluations))
        reason = f"waiting for the evaluation by {names or 'workers: nobody is here'}"
        return Waiting(reason=reason, what="evaluations")
    return None


def missing(state: State, now: float) -> str:
    """Say what each worker that has not answered is doing."""
    parts = [f"{one.worker} {one.sentence()}" for one in _doings(state, now)]
    short = _short(state)
    if short:
        parts.append(f"{short} more worker{'s'[: short > 1]} needed")
    return ", ".join(parts) or "all have answered"


def _before_a_round(state: State) -> Waiting | None:
    present, gate = ", ".join(sorted(state.workers)) or "nobody", workers_needed(state)
    if len(state.workers) < gate:
        reason = f"waiting for workers: {len(state.workers)} of {gate} are here ({present})"
        return Waiting(reason=reason, what="workers")
    if state.has_weights:
        return None
    reason = f"waiting for first weights from {state.init_asked}"
    return Waiting(reason=reason, what="first_weights")


def _short(state: State) -> int:
    if state.schedule.continuous:  # whoever is there can send all of them
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
        elif worker.state != "idle":  # still at an earlier round, or at a message of this one
            yield Doing(name, worker.state, round=worker.round)
        else:
            yield Doing(name, worker.state, heard_s=max(0.0, now - worker.last_seen))
