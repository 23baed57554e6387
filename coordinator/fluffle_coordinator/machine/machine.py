"""The life of a run as a pure state machine: events in, effects out.

``advance(state, event)`` returns the next state and what is to be done. No IO, no clock, no arrays:
time comes in as ``now`` (seconds of any monotonic clock), updates are known by a ``Handle``, and
the shell around it (``coordinator``) does what the effects say. So every interleaving of joins,
leaves, crashes, redeliveries and deadlines can be tried in tests, thousands a second.

::

    WAITING ──enough workers──> OPEN ──quorum (+ grace)──> COMMITTING ──Committed──> WAITING (next)
                                  └──deadline: reopen │ close │ stop                   │ after the
    ENDED <──all have evaluated, or deadline── EVALUATING <────────────────────────────┘ last round

A round opens when the one before it is on disk: what a worker is sent is always a checkpoint. Where
a damaged one takes a run back, what was trained from it is told apart by its ``base`` and refused.
Each piece of work has a ticket, (worker, sequence), which its update brings back.

The rules that hold whatever happens, which the tests check under random interleavings:

1. Rounds are committed in order, each once.
2. An update, known by (run, worker, sequence), is folded at most once; a copy of it is only held.
3. The last copy of a folded update is acknowledged only after the commit of its round is on disk.
4. Every delivery ends acknowledged, or rejected with a reason; what is late is said to be late.
5. Time alone leads to progress or to a declared stop; time without a link does not count.

This file takes the events in, ``updates`` those about updates, ``membership`` those about workers;
``transitions`` has what follows from the state they lead to. What distinguishes synchronous rounds
from asynchronous ones is in the run's ``schedule``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import ModelForm
from fluffle_coordinator.machine import membership, updates
from fluffle_coordinator.machine.agreement import refuse_unfit
from fluffle_coordinator.machine.effects import Ack, Effects, Record, RecordEvaluation
from fluffle_coordinator.machine.events import (
    Arrived,
    Committed,
    Connected,
    Disconnected,
    Echoed,
    EvaluationArrived,
    Event,
    Failed,
    Folded,
    FoldFailed,
    InitLost,
    Left,
    Seen,
    Tick,
    WeightsReady,
)
from fluffle_coordinator.machine.hearing import heard, put_off
from fluffle_coordinator.machine.rules import Rules
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.machine.state import (
    TICKETS_LEFT_OUT,
    Phase,
    State,
    Table,
    Ticket,
    remembered,
    still_matter,
)
from fluffle_coordinator.machine.transitions import progress, wakeup

__all__ = ["advance", "start", "wakeup"]

# What comes the way that signs of life come.
_HEARD = (Seen, Left, Failed, Echoed)


def start(
    rules: Rules,
    run: str,
    now: float,
    *,
    schedule: Schedule[State] = QUORUM,
    committed: int = 0,
    counted: Mapping[int, frozenset[Ticket]] = MappingProxyType({}),
    sequence: int = 0,
    announced: Mapping[str, int] = MappingProxyType({}),
    evaluated: bool = True,
    has_weights: bool = False,
    base: str = "",
    earlier: Mapping[int, str] = MappingProxyType({}),
    asked_in: Mapping[str, int] = MappingProxyType({}),
    train_s: Mapping[str, float] = MappingProxyType({}),
    classes: tuple[str, ...] | None = None,
    model: ModelForm | None = None,
    frozen: str = "",
    decided_by: str = "",
) -> State:
    """Return the state in which a coordinator starts, or starts again.

    Args:
        rules: what the operator decided.
        run: the run's id.
        now: the time.
        schedule: how rounds follow each other.
        committed: the last round on disk; 0 for a new run.
        counted: what is counted in the last rounds.
        sequence: the highest that is counted in any.
        announced: how many examples those who took part in any round had.
        evaluated: whether its model's evaluation is on disk.
        has_weights: whether there are weights to begin with.
        base: what they are named.
        earlier: what those were named that the rounds before began with.
        asked_in: the last round that each worker was asked in.
        train_s: how long each worker's last training took.
        classes: the classes that workers must have; None lets the workers say.
        model: what the weights are made of; None lets the workers say.
        frozen: the digest of the model's frozen tensors; empty if it has none.
        decided_by: who set those two, for people.
    """
    resumed = has_weights and committed > 0
    # Every living worker speaks up in this time, if it keeps the default of a heartbeat in 2 s.
    slowest = 2.0 * rules.patience
    state = State(
        rules=rules,
        run=run,
        round=committed + 1,
        schedule=schedule,
        base=base,
        sequence=sequence + TICKETS_LEFT_OUT,
        evaluate_pending=not evaluated,
        has_weights=has_weights,
        met=Table({ticket.worker: None for ticket in counted.get(committed, ())}),
        announced=Table(announced),
        asked_in=Table(asked_in),
        train_s=Table(train_s),
        classes=classes,
        model=model,
        frozen=frozen,
        decided_by=decided_by,
        gate=rules.min_workers,
        gate_until=now + slowest if resumed else math.inf,
        waiting_since=now,
        unlinked_since=now,
        heard_at=now,
    )
    before = {n: name for n, name in earlier.items() if n <= committed}
    return state.but(counted_before=remembered(state, counted), earlier=still_matter(state, before))


def advance(state: State, event: Event) -> tuple[State, Effects]:
    """Take one event; return the next state and what is to be done, in this order."""
    if state.phase is Phase.ENDED:
        return state, []
    out: Effects = []
    if isinstance(event, _HEARD):
        state = heard(state, event.now)
    before, state = state, _TAKE[type(event)](state, event, out)
    _tell_of_the_quorum(before, state, event, out)
    return progress(state, event.now, out), out


def _tell_of_the_quorum(before: State, after: State, event: Event, out: Effects) -> None:
    """Let people know when the quorum of an open round shrinks, and for whom."""
    if after.tally.expected >= before.tally.expected or after.phase is not Phase.OPEN:
        return
    if (before.phase, before.round) != (after.phase, after.round):
        return
    was, needed = before.needed, after.needed
    if needed >= was:
        return
    reason = _why_fewer(before, after, event)
    out.append(Record(run_events.Quorum(round=after.round, needed=needed, was=was, reason=reason)))


def _why_fewer(before: State, after: State, event: Event) -> str:
    gone = [n for n in before.asked if n in before.workers and n not in after.workers]
    if gone:
        return f"{', '.join(sorted(gone))} {'left' if isinstance(event, Left) else 'is gone'}"
    failed = [name for name in after.failed if name not in before.failed]
    return f"{', '.join(sorted(failed)) or 'a worker'} failed"


# --- one function an event ---------------------------------------------------------------------


def _connected(state: State, event: Connected, out: Effects) -> State:
    first = state.link == 0 and not state.workers
    out.append(Record(run_events.Connected() if first else run_events.Reconnected()))
    # The outage counts for nothing: nobody could be heard of, and updates wait in the broker.
    if state.link == 0:
        state = put_off(state, event.now - state.unlinked_since)
    workers = {n: replace(w, last_seen=event.now) for n, w in state.workers.items()}
    received = {t: update._replace(spares=()) for t, update in state.received.items()}
    # What was being sent has an unknown outcome: whoever is idle at its next sign of life is sent
    # the work again. And every delivery that we hold is void: it will come again.
    for update in state.received.values():
        out.extend(Ack(spare) for spare in update.spares)
    return state.but(
        link=event.link,
        caught_up=False,
        greeted=Table(),
        heard_at=event.now,
        workers=Table(workers),
        asked=Table({n: issued._replace(at=-math.inf) for n, issued in state.asked.items()}),
        received=Table(received),
        init_asked=None,
        frozen_sent=Table(),
    )


def _disconnected(state: State, event: Disconnected, _: Effects) -> State:
    return state.but(link=0, unlinked_since=event.now) if state.link else state


def _echoed(state: State, event: Echoed, _: Effects) -> State:
    return state.but(caught_up=True) if event.link == state.link else state


def _init_lost(state: State, event: InitLost, _: Effects) -> State:
    return state.but(init_asked=None) if event.worker == state.init_asked else state


def _weights_ready(state: State, event: WeightsReady, out: Effects) -> State:
    state = state.but(has_weights=True, base=event.base, frozen=event.frozen)
    return refuse_unfit(state, out) if event.frozen else state


def _evaluation(state: State, event: EvaluationArrived, out: Effects) -> State:
    number = event.round
    if number in state.unevaluated and (event.run, event.base) == (
        state.run,
        state.base_of(number + 1),
    ):  # the first that is heard of an older version, from whoever began with it
        out.append(RecordEvaluation(number, {event.worker: event.evaluated}))
        return state.but(unevaluated=state.unevaluated - {number})
    wanted = (state.run, state.round - 1, state.base)
    if (event.run, event.round, event.base) != wanted or not state.evaluate_pending:
        return state  # its model's line is written already; late is only late
    evaluations = state.evaluations.insert(event.worker, event.evaluated)
    return state.of(event.worker, evaluations=evaluations)


_TAKE: Mapping[type[Event], Callable[[State, Any, Effects], State]] = {
    Connected: _connected,
    Disconnected: _disconnected,
    Echoed: _echoed,
    Seen: membership.seen,
    Left: membership.left,
    Failed: membership.failed,
    InitLost: _init_lost,
    WeightsReady: _weights_ready,
    Arrived: updates.arrived,
    Folded: updates.folded,
    FoldFailed: updates.fold_failed,
    EvaluationArrived: _evaluation,
    Committed: updates.committed,
    Tick: membership.tick,
}
