"""Work: giving it to workers, with tickets, and when a worker counts as gone or stalled.

Part of the pure machine (``machine``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fluffle_coordinator.machine.effects import Effect, Effects, SendEvaluate, SendFit
from fluffle_coordinator.machine.state import Issued, Phase, State, Worker


def first_due(state: State) -> float:
    """Return when the first worker counts as gone or stalled, unless it is heard before."""
    return min((_worker_due(state, worker) for worker in state.workers.values()), default=math.inf)


def watched(state: State, name: str) -> State:
    """Make sure that the next check comes in time for a worker that has changed."""
    due = _worker_due(state, state.workers[name]) if name in state.workers else math.inf
    return state.replace(due_at=due) if due < state.due_at else state


def _worker_due(state: State, worker: Worker) -> float:
    return min(worker.deadline(state.rules), *stall_times(state, worker), math.inf)


def stall_times(state: State, worker: Worker) -> Iterator[float]:
    """Yield when a worker that does not advance is reported, and when it counts as failed."""
    rules = state.rules
    if worker.has_steps and worker.name in state.asked and worker.name not in state.failed:
        if not worker.stalled:
            yield worker.moved_at + rules.stall_s
        if rules.stall_timeout_s is not None and state.busy(worker.name):
            yield worker.moved_at + rules.stall_timeout_s


def work(state: State, workers: tuple[str, ...]) -> list[Effect]:
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


def give_work(state: State, workers: tuple[str, ...], now: float, out: Effects) -> State:
    """Send the open version to idle workers, each with a ticket."""
    if not workers:
        return state
    state = next_sequence(state)
    issued = Issued(now, state.sequence, state.round)
    for name in workers:
        state = watched(state.replace_for(name, asked=state.asked.insert(name, issued)), name)
    out += work(state, workers)
    return note_asked(state, workers)


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


def send_again(state: State, worker: str, now: float, out: Effects) -> State:
    """Send a worker its work again, or new work if there are newer weights."""
    issued = state.asked[worker]
    if state.phase is Phase.OPEN and issued.round != state.round:
        return give_work(state, (worker,), now, out)
    state = state.replace_for(worker, asked=state.asked.insert(worker, issued._replace(at=now)))
    out += work(state, (worker,))
    return state
