"""The machine's clock, and the deadlines of workers.

The clock runs only while someone could have been heard.

If the coordinator is stopped, its host swaps or the broker blocks all publishers, all workers seem
to fall silent at once. So the coordinator sends itself an echo through the queue of heartbeats. If
nothing is heard for longer than ``State.hearing_s``, none of this time counts: the clock goes back
to the last message. With the next message it starts again, and every timer is postponed by the time
that was lost. So all messages that waited are read before any timer expires.

A worker counts as gone or stalled at its deadline. ``State.due_at`` is a lower bound of all these
deadlines, so that most ticks need not look at every worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fluffle_coordinator.machine.records import Worker
from fluffle_coordinator.machine.state import State, Table


def clock_time(state: State, now: float) -> float:
    """Return the time, or that of the last message, if it is longer ago than ``hearing_s``."""
    return now if now <= state.heard_at + state.hearing_s else state.heard_at


def standstill_s(state: State, now: float) -> float:
    """Return how long the clock has stood still; every timer will be postponed by that time."""
    return now - (clock_time(state, now) if state.link else state.unlinked_since)


def heard(state: State, now: float) -> State:
    """Note that something was heard; postpone all timers if the clock had stopped."""
    lost_s = now - clock_time(state, now)
    if lost_s > 0:
        state = postpone(state, lost_s)
        # What was sent during the silence has waited for no time yet.
        asked = {n: i._replace(at=min(i.at + lost_s, now)) for n, i in state.asked.items()}
        sent = {session: min(at + lost_s, now) for session, at in state.frozen_sent.items()}
        state = state.replace(asked=Table(asked), frozen_sent=Table(sent))
    return state.replace(heard_at=now, clock_stands=False)


def postpone(state: State, seconds: float) -> State:
    """Move every timer by so many seconds."""
    workers = Table(
        {
            name: replace(
                worker,
                last_seen=worker.last_seen + seconds,
                moved_at=worker.moved_at + seconds,
                received_at=worker.received_at + seconds,
            )
            for name, worker in state.workers.items()
        }
    )
    return state.replace(
        workers=workers,
        due_at=state.due_at + seconds,
        opened_at=state.opened_at + seconds,
        began_at=state.began_at + seconds,
        quorum_at=None if state.quorum_at is None else state.quorum_at + seconds,
        waiting_since=state.waiting_since + seconds,
        init_asked_at=state.init_asked_at + seconds,
        init_after=state.init_after + seconds,
        gate_until=state.gate_until + seconds,
    )


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
    rules, name, after_s = state.rules, worker.name, worker.stall_s(state.rules)
    awaited = name in state.asked and name not in state.failed and state.answer(name) is None
    if after_s < math.inf and awaited:
        if not worker.stalled:
            yield worker.moved_at + after_s
        if rules.stall_timeout_s is not None and state.busy(name):
            yield worker.moved_at + rules.stall_timeout_s
