"""Work: which tickets workers are issued, and the effects that send them their work.

Part of the pure machine (``machine``).
"""

from __future__ import annotations

from fluffle_coordinator.machine.effects import Effect, Effects, SendEvaluate, SendFit
from fluffle_coordinator.machine.state import Issued, Phase, State
from fluffle_coordinator.machine.worker_deadlines import schedule_check


def work_effects(state: State, workers: tuple[str, ...]) -> list[Effect]:
    """Return the effects that send these workers what ``State.asked`` says: one per message."""
    if state.phase is Phase.EVALUATING:
        return [SendEvaluate(workers)]
    recipients: dict[tuple[int, int], list[str]] = {}
    for name in workers:
        key = state.asked[name].sequence, state.attempts.get(name, 0)
        recipients.setdefault(key, []).append(name)
    return [
        SendFit(tuple(names), state.evaluate_pending, sequence, attempt)
        for (sequence, attempt), names in sorted(recipients.items())
    ]


def assign_work(state: State, workers: tuple[str, ...], now: float, out: Effects) -> State:
    """Send the open version to idle workers, each with a ticket."""
    if not workers:
        return state
    state = next_sequence(state)
    issued = Issued(now, state.sequence, state.round)
    for name in workers:
        state = issue(state, name, issued)
    out += work_effects(state, workers)
    return note_asked(state, workers)


def issue(state: State, name: str, issued: Issued) -> State:
    """Note what a worker is asked for, and make sure that it is checked in time."""
    return schedule_check(state.replace_for(name, asked=state.asked.insert(name, issued)), name)


def note_asked(state: State, workers: tuple[str, ...]) -> State:
    """Note the round that workers were last asked in, for selections that need it."""
    if not state.selects:
        return state
    asked_in = state.asked_in
    for name in workers:
        asked_in = asked_in.insert(name, state.round)
    return state.replace(asked_in=asked_in)


def next_sequence(state: State) -> State:
    """Advance the sequence for new work; if each worker is asked once a round, to the round."""
    continuous = state.schedule.continuous
    return state.replace(sequence=state.sequence + 1 if continuous else state.round)


def resend_work(state: State, worker: str, now: float, out: Effects) -> State:
    """Send a worker its work again, or new work if there are newer weights."""
    issued = state.asked[worker]
    if state.phase is Phase.OPEN and issued.round != state.round:
        return assign_work(state, (worker,), now, out)
    state = state.replace_for(worker, asked=state.asked.insert(worker, issued._replace(at=now)))
    out += work_effects(state, (worker,))
    return state
