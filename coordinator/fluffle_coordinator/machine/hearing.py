"""Which time counts: only time in which somebody could have been heard.

A coordinator that was stopped, a machine that swapped, a broker that blocks all publishers: from
the inside, each looks as if every worker had fallen silent at once. So the coordinator sends itself
an echo, the way that signs of life come, and the clock runs on only while anything is heard. When
nothing is, for longer than ``State.hearing_s``, the clock stops; once something is heard again,
everything that waits for time is put off by what was missed. So whatever came in the meantime is
read before the clock is asked.
"""

from __future__ import annotations

from dataclasses import replace

from fluffle_coordinator.machine.state import State, Table


def clock(state: State, now: float) -> float:
    """Return the time that counts, which is not past the last that was heard by much."""
    return min(now, state.heard_at + state.hearing_s)


def heard(state: State, now: float) -> State:
    """Note that something was heard; put off by what was missed, if it was silent for too long."""
    missed_s = now - state.heard_at - state.hearing_s
    if missed_s > 0:
        state = put_off(state, missed_s)
    return state.but(heard_at=now)


def put_off(state: State, seconds: float) -> State:
    """Move everything that waits for time by so many seconds."""
    workers = Table(
        {
            name: replace(
                worker, last_seen=worker.last_seen + seconds, moved_at=worker.moved_at + seconds
            )
            for name, worker in state.workers.items()
        }
    )
    return state.but(
        workers=workers,
        due_at=state.due_at + seconds,
        opened_at=state.opened_at + seconds,
        began_at=state.began_at + seconds,
        quorum_at=None if state.quorum_at is None else state.quorum_at + seconds,
        waiting_since=state.waiting_since + seconds,
        init_asked_at=state.init_asked_at + seconds,
        gate_until=state.gate_until + seconds,
    )
