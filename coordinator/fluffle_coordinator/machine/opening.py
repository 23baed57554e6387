"""The opening of a round: how many workers must be present, who gets work, and reopening."""

from __future__ import annotations

import math
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.agreement import decide
from fluffle_coordinator.machine.effects import Effects
from fluffle_coordinator.machine.finishing import end
from fluffle_coordinator.machine.first_weights import ask_for_weights
from fluffle_coordinator.machine.state import Issued, Phase, State, Table
from fluffle_coordinator.machine.work import next_sequence, note_asked, send_work


def try_to_open(state: State, now: float, out: Effects) -> State:
    """Open the next round if there are weights and enough workers; stop if that takes too long."""
    if state.has_enough_workers:
        state = decide(state, out)  # may refuse some of them
    if state.has_enough_workers and state.has_weights:
        return _open(state, now, out)
    wait_s = state.rules.wait_s
    if now >= state.waiting_since + wait_s:
        reason = (
            "no first weights arrived"
            if state.has_enough_workers
            else f"{len(state.workers)} of {state.workers_for_quorum} workers joined"
        )
        reason += f" in {wait_s:.0f} s (--wait-workers){state.and_refused}"
        return end(state, "stopped", reason, out)
    return state if state.has_weights else ask_for_weights(state, now, out)


def _open(state: State, now: float, out: Effects) -> State:
    state = next_sequence(state).replace_and_recount(
        phase=Phase.OPEN,
        began_at=now,
        asked=_still_at_work(state, now),
        failed=Table(),
        doubted=Table(),
        attempts=Table(),
        draws=0,
        gate=1,
        gate_until=math.inf,
    )
    return _ask(state, state.schedule.cohort(state), now, out)


def _still_at_work(state: State, now: float) -> Table[str, Issued]:
    """Return the workers that continue with earlier work, if work outlives its round."""
    if not state.schedule.continuous:
        return Table()
    earlier = {worker.name: state.issued_before(worker, now) for worker in state.workers.values()}
    asked = {name: issued for name, issued in earlier.items() if issued}
    for name, issued in state.asked.items():
        sound = name not in state.doubted or state.busy(name)
        if name in state.workers and name not in state.failed and sound:
            asked[name] = issued
    return Table(asked)


def reopen(state: State, reason: str, now: float, out: Effects) -> State:
    """Open the round again after its deadline, with the workers that are present now."""
    asked_before = state.asked_before.union(state.asked)
    if state.schedule.continuous:  # a worker that is not at work has lost its work
        busy = {name: issued for name, issued in state.asked.items() if state.busy(name)}
        state = state.replace_and_recount(asked=Table(busy), failed=Table())
    state = next_sequence(state).replace(asked_before=asked_before)
    return _ask(state, state.schedule.again(state), now, out, reason)


def _ask(
    state: State, cohort: tuple[str, ...], now: float, out: Effects, reason: str | None = None
) -> State:
    """Ask a cohort for updates of the open round; ``reason`` says why, if it is open again."""
    issued = Issued(now, state.sequence, state.round)
    continuous = state.schedule.continuous
    # When a round opens, updates that an earlier coordinator asked for may have arrived already.
    answered = {
        ticket.worker: Issued(-math.inf, ticket.sequence, state.round)
        for ticket, update in state.received.items()
        if not continuous and update.round == state.round
    }
    at_work = state.asked.items() if continuous else ()
    asked = {**dict(at_work), **dict.fromkeys(cohort, issued), **answered}
    state = state.replace_and_recount(
        opened_at=now,
        due_at=-math.inf,
        asked=Table(asked),
        failed=Table(),
        doubted=Table(),
        draws=state.draws + 1,
    )
    state = note_asked(state, cohort)
    unanswered = tuple(name for name in cohort if name not in answered)
    about: dict[str, Any] = {
        "round": state.round,
        "asked": tuple(sorted(asked)),
        "needed": state.needed,
        "deadline_s": state.rules.deadline_s,
    }
    if reason is None:
        state = send_work(state, unanswered, now, out)
        out.append(run_events.Opened(**about))
        return state
    out.append(run_events.Reopened(**about, reason=reason))
    if not continuous:  # what is on its way is the same work
        unanswered = tuple(name for name in unanswered if not state.receives(name, now))
    return send_work(state, tuple(n for n in unanswered if not state.busy(n)), now, out)
