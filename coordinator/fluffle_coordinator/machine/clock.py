"""The machine's clock, which runs only while someone could have been heard.

If the coordinator is stopped, its host swaps or the broker blocks all publishers, all workers seem
to fall silent at once. So the coordinator sends itself an echo through the queue of heartbeats. If
nothing is heard for longer than ``State.hearing_s``, the clock stops. With the next message it
starts again, and every timer is postponed by the time that was lost. So all messages that waited
are read before any timer expires.
"""

from __future__ import annotations

from dataclasses import replace

from fluffle_coordinator.machine.state import State, Table


def clock_time(state: State, now: float) -> float:
    """Return the time at which the clock stands: at most ``hearing_s`` after the last message."""
    return min(now, state.heard_at + state.hearing_s)


def standstill_s(state: State, now: float) -> float:
    """Return how long the clock has stood still; every timer will be postponed by that time."""
    return now - (clock_time(state, now) if state.link else state.unlinked_since)


def heard(state: State, now: float) -> State:
    """Note that something was heard; postpone all timers if the clock had stopped."""
    lost_s = now - state.heard_at - state.hearing_s
    if lost_s > 0:
        state = postpone(state, lost_s)
    return state.replace(heard_at=now)


def postpone(state: State, seconds: float) -> State:
    """Move every timer by so many seconds."""
    workers = Table(
        {
            name: replace(
                worker, last_seen=worker.last_seen + seconds, moved_at=worker.moved_at + seconds
            )
            for name, worker in state.workers.items()
        }
    )
    asked = {n: issued._replace(at=issued.at + seconds) for n, issued in state.asked.items()}
    return state.replace(
        workers=workers,
        asked=Table(asked),
        frozen_sent=Table({name: at + seconds for name, at in state.frozen_sent.items()}),
        due_at=state.due_at + seconds,
        opened_at=state.opened_at + seconds,
        began_at=state.began_at + seconds,
        quorum_at=None if state.quorum_at is None else state.quorum_at + seconds,
        waiting_since=state.waiting_since + seconds,
        init_asked_at=state.init_asked_at + seconds,
        gate_until=state.gate_until + seconds,
    )
