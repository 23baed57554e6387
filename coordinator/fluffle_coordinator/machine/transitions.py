"""The transitions of a run: what follows from its state and the time, whatever event led to it.

``progress`` runs after every event and chooses the transition by the phase. The transitions
themselves are in ``first_weights``, ``opening``, ``closing`` and ``evaluation``.
"""

from __future__ import annotations

import math

from fluffle_coordinator.machine.clock import clock_time
from fluffle_coordinator.machine.closing import due_at, try_to_close
from fluffle_coordinator.machine.effects import Effects
from fluffle_coordinator.machine.evaluation import (
    evaluate_last_model,
    record_evaluation,
    try_to_finish,
)
from fluffle_coordinator.machine.opening import try_to_open
from fluffle_coordinator.machine.state import Phase, State
from fluffle_coordinator.machine.worker_deadlines import first_due


def progress(state: State, now: float, out: Effects) -> State:
    """Take the transitions that the state and the time allow; none while there is no link."""
    if not state.link:
        return state
    now = clock_time(state, now)
    if now >= state.gate_until:
        state = state.replace(gate=1, gate_until=math.inf)
    match state.phase:
        case Phase.WAITING if state.round > state.rules.rounds or state.enough:
            return evaluate_last_model(state, now, out)
        case Phase.WAITING:
            state = try_to_open(state, now, out)
            # Updates that an earlier coordinator asked for may have arrived before the opening.
            return try_to_close(state, now, out) if state.phase is Phase.OPEN else state
        case Phase.OPEN:
            return try_to_close(record_evaluation(state, out), now, out)
        case Phase.COMMITTING:
            return record_evaluation(state, out)
        case Phase.EVALUATING:
            return try_to_finish(state, now, out)
        case Phase.ENDED:
            return state


def wakeup(state: State) -> float:
    """Return the latest time at which the next ``Tick`` is due; infinity if no timer runs.

    A timer that expires after the clock has stopped (see ``clock``) needs no ``Tick``: the next
    message restarts the clock.
    """
    if not state.link or state.phase is Phase.ENDED:
        return math.inf
    due = _next_timer(state)
    return due if due <= state.heard_at + state.hearing_s else math.inf


def _next_timer(state: State) -> float:
    rules = state.rules
    times = [state.gate_until, first_due(state) if math.isinf(state.due_at) else state.due_at]
    if state.phase is Phase.OPEN:
        times.append(due_at(state))
        if state.quorum_at is not None:
            times.append(state.schedule.wakeup(state))
    elif state.phase is Phase.WAITING:
        times.append(state.waiting_since + rules.wait_s)
        if state.init_asked is not None and not state.has_weights:
            times.append(state.init_asked_at + rules.deadline_s)
    elif state.phase is Phase.EVALUATING:
        times.append(state.opened_at + rules.deadline_s)
    return min(times)
