"""The life of a run as a pure state machine: events in, effects out.

``advance(state, event)`` returns the next state and the effects, which the shell around it
(``service``) carries out in order. The machine does no IO, reads no clock and holds no arrays: time
comes in as ``now`` (seconds of any monotonic clock), and an update is a ``Handle``. So tests can
try thousands of interleavings of joins, leaves, crashes, redeliveries and deadlines a second.

::

    WAITING ──enough workers──> OPEN ──quorum (+ grace)──> COMMITTING ──Committed──> WAITING (next)
                                  └──deadline: reopen │ close │ stop                   │ after the
    ENDED <──all have evaluated, or deadline── EVALUATING <────────────────────────────┘ last round

A round opens once the previous one is on disk, so a worker is only ever sent a checkpoint. If a
damaged checkpoint takes a run back, updates that were trained from the lost versions are recognised
by their ``base`` and rejected. Each piece of work has a ticket, (worker, sequence), which comes
back with its update.

The tests check these rules under random interleavings:

1. Rounds are committed in order, each once.
2. An update, identified by (run, worker, sequence), is folded at most once; copies are only held.
3. The last copy of a folded update is acknowledged only after its round's commit is on disk.
4. Every delivery is acknowledged, or rejected with a reason; a late update is reported as late.
5. Time alone leads to progress or to a declared stop; time without a link does not count.

An event is handled in two steps. Its handler takes it in: ``updates`` handles updates,
``membership`` workers, ``evaluation`` evaluations. Then ``_progress`` takes the run from phase to
phase, whatever event led there. The run's ``schedule`` decides what differs between synchronous and
asynchronous rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine import evaluation, finishing, first_weights, membership, updates
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine.clock import clock_time, first_due, heard, postpone
from fluffle_coordinator.machine.closing import due_at, report_smaller_quorum, try_to_close
from fluffle_coordinator.machine.effects import Ack, Effects, Welcome
from fluffle_coordinator.machine.opening import try_to_open
from fluffle_coordinator.machine.records import Ticket
from fluffle_coordinator.machine.rules import Rules
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.machine.state import SEQUENCE_GAP, Phase, State, Table

_ALL_HEARD_S = 10.0  # a connected worker sends a heartbeat within this time, every 2 s by default
# The events that arrive in the queue of heartbeats.
_HEARD = (ev.Seen, ev.Left, ev.Failed, ev.Echoed)


def start(
    rules: Rules,
    run: str,
    now: float,
    *,
    committed: int = 0,
    counted: Mapping[int, frozenset[Ticket]] = MappingProxyType({}),
    earlier: Mapping[int, str] = MappingProxyType({}),
    earlier_starts: int = 0,
    evaluated: bool = True,
    **known: Any,
) -> State:
    """Return the initial state of a new run, or of one that goes on after its last commit.

    ``committed`` is the last round on disk, 0 for a new run; ``counted`` has the tickets that each
    round counted, ``earlier_starts`` is the number of coordinators that ran before, and ``earlier``
    has the names of the weights that rounds began with. ``evaluated`` says whether the evaluation
    of the last model is on disk. ``known`` are other fields of ``State``; the workers decide on
    ``classes`` and ``model`` if these are None.
    """
    sequence = max((t.sequence for tickets in counted.values() for t in tickets), default=0)
    state = State(
        rules=rules,
        run=run,
        round=committed + 1,
        sequence=sequence + (1 + earlier_starts) * SEQUENCE_GAP,
        evaluate_pending=not evaluated,
        gate=rules.min_workers,
        waiting_since=now,
        unlinked_since=now,
        heard_at=now,
        hearing_s=rules.hearing_s,
        **{"schedule": QUORUM, **known},
    )
    if state.has_weights:
        gate_until = now + _ALL_HEARD_S if committed else math.inf
        state = state.replace(resumed_at=committed + 1, gate_until=gate_until)
    earlier = {number: name for number, name in earlier.items() if number <= committed}
    return updates.remember(state, counted, earlier)


def advance(state: State, event: ev.Event) -> tuple[State, Effects]:
    """Return the state after an event, and the effects to carry out in this order."""
    if state.phase is Phase.ENDED:
        return state, []
    out: Effects = []
    if isinstance(event, _HEARD):
        state = heard(state, event.now)
    elif state.link and clock_time(state, event.now) < event.now and not state.clock_stands:
        state = state.replace(clock_stands=True)
    before, state = state, _HANDLERS[type(event)](state, event, out)
    report_smaller_quorum(before, state, event, out)
    return _progress(state, event.now, out), out


def _connected(state: State, event: ev.Connected, out: Effects) -> State:
    first = state.link == 0 and not state.workers
    out.append(run_events.Connected() if first else run_events.Reconnected())
    # The outage does not count: no worker could be heard, and updates wait in the broker.
    if state.link == 0:
        state = postpone(state, event.now - state.unlinked_since)
    workers = {n: replace(w, last_seen=event.now) for n, w in state.workers.items()}
    out.extend(Welcome(name) for name in workers)  # the first may be lost
    # Work that was being sent may be lost: a worker that is idle at its next heartbeat gets it
    # again. Every delivery that is held is void, and the broker redelivers it.
    for copies in state.spares.values():
        out.extend(Ack(copy.handle) for copy in copies)
    return state.replace(
        link=event.link,
        caught_up=False,
        greeted=Table(),
        heard_at=event.now,
        clock_stands=False,
        workers=Table(workers),
        asked=Table({n: issued._replace(at=-math.inf) for n, issued in state.asked.items()}),
        spares=Table(),
        init_asked=None,
        frozen_sent=Table(),
    )


def _disconnected(state: State, event: ev.Disconnected, _: Effects) -> State:
    if not state.link:
        return state
    # A silence before the loss belongs to the outage: nobody could be heard since it began.
    return state.replace(link=0, unlinked_since=clock_time(state, event.now))


def _echoed(state: State, event: ev.Echoed, _: Effects) -> State:
    return state.replace(caught_up=True) if event.link == state.link else state


_HANDLERS: Mapping[type[ev.Event], Callable[[State, Any, Effects], State]] = {
    ev.Connected: _connected,
    ev.Disconnected: _disconnected,
    ev.Echoed: _echoed,
    ev.Seen: membership.seen,
    ev.Left: membership.left,
    ev.Failed: membership.failed,
    ev.InitLost: first_weights.init_lost,
    ev.WeightsReady: first_weights.weights_ready,
    ev.Arrived: updates.arrived,
    ev.Folded: updates.folded,
    ev.FoldFailed: updates.fold_failed,
    ev.EvaluationArrived: evaluation.evaluation_arrived,
    ev.Committed: updates.committed,
    ev.Tick: membership.tick,
}


def _progress(state: State, now: float, out: Effects) -> State:
    """Take the transitions that the state and the time allow; none while there is no link."""
    if not state.link:
        return state
    now = clock_time(state, now)
    if now >= state.gate_until:
        state = state.replace(gate=1, gate_until=math.inf)
    match state.phase:
        case Phase.OPEN:
            return try_to_close(evaluation.record_evaluation(state, out), now, out)
        case Phase.COMMITTING:
            return evaluation.record_evaluation(state, out)
        case Phase.WAITING if state.round > state.rules.rounds or state.enough:
            return finishing.evaluate_last_model(state, now, out)
        case Phase.WAITING:
            state = try_to_open(state, now, out)
            # Updates that an earlier coordinator asked for may have arrived before the opening.
            return try_to_close(state, now, out) if state.phase is Phase.OPEN else state
        case Phase.EVALUATING:
            return finishing.try_to_finish(state, now, out)
        case Phase.ENDED:
            return state


def wakeup(state: State) -> float:
    """Return the latest time at which the next ``Tick`` is due; infinity if no timer runs.

    A timer that expires after the clock has stopped (see ``clock``) needs no ``Tick``: the next
    message restarts the clock.
    """
    if not state.link or state.phase is Phase.ENDED or state.clock_stands:
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
        times.append(state.init_after)
    elif state.phase is Phase.EVALUATING:
        times.append(state.opened_at + rules.deadline_s)
    return min(times)
