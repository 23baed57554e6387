"""Work: who is given which, with which ticket, and when a worker that has some is due.

A part of the round machine (``machine``), as pure as the rest of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fluffle_coordinator.machine.effects import Effect, Effects, SendEvaluate, SendFit
from fluffle_coordinator.machine.state import Issued, Phase, State, Worker


def first_due(state: State) -> float:
    """Return when the first worker is gone or stands still, unless it is heard of before."""
    return min((_worker_due(state, worker) for worker in state.workers.values()), default=math.inf)


def watched(state: State, name: str) -> State:
    """See to it that a worker is looked at in time, of which something has changed."""
    due = _worker_due(state, state.workers[name]) if name in state.workers else math.inf
    return state.but(due_at=due) if due < state.due_at else state


def _worker_due(state: State, worker: Worker) -> float:
    return min(worker.deadline(state.rules), *stall_times(state, worker), math.inf)


def stall_times(state: State, worker: Worker) -> Iterator[float]:
    """Yield when a worker that does not advance is told of, and when it counts as failed."""
    rules = state.rules
    if worker.has_steps and worker.name in state.asked and worker.name not in state.failed:
        if not worker.stalled:
            yield worker.moved_at + rules.stall_s
        if rules.stall_timeout_s is not None and state.busy(worker.name):
            yield worker.moved_at + rules.stall_timeout_s


def work(state: State, workers: tuple[str, ...]) -> list[Effect]:
    """Return the effects that send the work of the moment to these workers, who were asked."""
    if state.phase is Phase.EVALUATING:
        return [SendEvaluate(workers)]
    alike: dict[tuple[int, int], list[str]] = {}
    for name in workers:
        key = state.asked[name].sequence, state.attempts.get(name, 0)
        alike.setdefault(key, []).append(name)
    return [
        SendFit(tuple(names), state.evaluate_pending, sequence, attempt)
        for (sequence, attempt), names in sorted(alike.items())
    ]


def give_work(state: State, workers: tuple[str, ...], now: float, out: Effects) -> State:
    """Send the open version to workers that have nothing to do, each with a ticket."""
    if not workers:
        return state
    state = next_sequence(state)
    issued = Issued(now, state.sequence, state.round)
    for name in workers:
        state = watched(state.of(name, asked=state.asked.insert(name, issued)), name)
    out += work(state, workers)
    return noted(state, workers)


def noted(state: State, workers: tuple[str, ...]) -> State:
    """Note in which round workers were asked last, for whoever selects them by turns."""
    asked_in = state.asked_in
    for name in workers:
        asked_in = asked_in.insert(name, state.round)
    return state.but(asked_in=asked_in)


def next_sequence(state: State) -> State:
    """Count on for new work; where each worker is asked once a round, it is the round."""
    continuous = state.schedule.continuous
    return state.but(sequence=state.sequence + 1 if continuous else state.round)


def send_again(state: State, worker: str, now: float, out: Effects) -> State:
    """Send a worker again what it was asked for, or other work if there are newer weights."""
    issued = state.asked[worker]
    if state.phase is Phase.OPEN and issued.round != state.round:
        return give_work(state, (worker,), now, out)
    state = state.of(worker, asked=state.asked.insert(worker, issued._replace(at=now)))
    out += work(state, (worker,))
    return state
