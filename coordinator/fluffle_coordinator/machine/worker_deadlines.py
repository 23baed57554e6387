"""Deadlines of workers: when each counts as gone or stalled, and when that is next checked.

Part of the pure machine (``machine``). ``State.due_at`` is a lower bound of all these deadlines, so
that most ticks need not look at every worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fluffle_coordinator.machine.state import State, Worker


def first_due(state: State) -> float:
    """Return when the first worker counts as gone or stalled, unless it is heard before."""
    return min((_worker_due(state, worker) for worker in state.workers.values()), default=math.inf)


def schedule_check(state: State, name: str) -> State:
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
