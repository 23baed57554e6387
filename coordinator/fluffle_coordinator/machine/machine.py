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

The rules that hold whatever happens, which the tests check under random interleavings:

1. Rounds are committed in order, each once.
2. An update, known by (run, round, worker), is folded at most once; a copy of it is only held.
3. The last copy of a folded update is acknowledged only after the commit of its round is on disk.
4. Every delivery ends acknowledged, or rejected with a reason; what is late is said to be late.
5. Time alone leads to progress or to a declared stop; time without a link does not count.

This file takes the events in; ``transitions`` has what follows from the state they lead to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import median
from types import MappingProxyType
from typing import Any

from fluffle_common.errors import Cause
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import ModelForm
from fluffle_coordinator.machine import membership
from fluffle_coordinator.machine.effects import Ack, Effects, Fold, Judge, Record, Reject
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
from fluffle_coordinator.machine.state import (
    Handle,
    Phase,
    Received,
    Rules,
    State,
    Table,
    Tally,
)
from fluffle_coordinator.machine.transitions import progress, wakeup, work

__all__ = ["advance", "start", "wakeup"]

# Of so many rounds it is remembered who took part.
_REMEMBERED = 3
# What comes the way that signs of life come.
_HEARD = (Seen, Left, Failed, Echoed)


def start(
    rules: Rules,
    run: str,
    now: float,
    *,
    committed: int = 0,
    participants: Iterable[str] = (),
    announced: Mapping[str, int] = MappingProxyType({}),
    evaluated: bool = True,
    has_weights: bool = False,
    base: str = "",
    classes: tuple[str, ...] | None = None,
    model: ModelForm | None = None,
    decided_by: str = "",
) -> State:
    """Return the state in which a coordinator starts, or starts again.

    Args:
        rules: what the operator decided.
        run: the run's id.
        now: the time.
        committed: the last round on disk; 0 for a new run.
        participants: who took part in it.
        announced: how many examples those who took part in any round had.
        evaluated: whether its model's evaluation is on disk.
        has_weights: whether there are weights to begin with.
        base: what they are named.
        classes: the classes that workers must have; None lets the workers say.
        model: what the weights are made of; None lets the workers say.
        decided_by: who set those two, for people.
    """
    resumed = has_weights and committed > 0
    # Every living worker speaks up in this time, if it keeps the default of a heartbeat in 2 s.
    slowest = 2.0 * rules.patience
    return State(
        rules=rules,
        run=run,
        round=committed + 1,
        base=base,
        counted_before={committed: frozenset(participants)},
        evaluate_pending=not evaluated,
        has_weights=has_weights,
        met=Table(dict.fromkeys(participants)),
        announced=Table(announced),
        classes=classes,
        model=model,
        decided_by=decided_by,
        gate=rules.min_workers,
        gate_until=now + slowest if resumed else math.inf,
        waiting_since=now,
        unlinked_since=now,
        heard_at=now,
    )


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
    received = {w: update._replace(spares=()) for w, update in state.received.items()}
    # What was being sent has an unknown outcome: whoever is idle at its next sign of life is sent
    # the work again. And every delivery that we hold is void: it will come again.
    for update in state.received.values():
        out.extend(Ack(spare) for spare in update.spares)
    return state.but(
        link=event.link,
        caught_up=False,
        greeted=frozenset(),
        heard_at=event.now,
        workers=Table(workers),
        asked=Table(dict.fromkeys(state.asked, -math.inf)),
        received=Table(received),
        init_asked=None,
    )


def _disconnected(state: State, event: Disconnected, _: Effects) -> State:
    return state.but(link=0, unlinked_since=event.now) if state.link else state


def _echoed(state: State, event: Echoed, _: Effects) -> State:
    return state.but(caught_up=True) if event.link == state.link else state


def _init_lost(state: State, event: InitLost, _: Effects) -> State:
    return state.but(init_asked=None) if event.worker == state.init_asked else state


def _weights_ready(state: State, event: WeightsReady, _: Effects) -> State:
    return state.but(has_weights=True, base=event.base)


def _arrived(state: State, event: Arrived, out: Effects) -> State:
    handle, worker = event.handle, event.worker
    if event.run != state.run:
        out.append(Reject(handle, f"it is of run {event.run}, this is run {state.run}", "run"))
        return state
    if event.round < state.round:
        return _of_an_earlier_round(state, event, out)
    if event.round > state.round or not _takes(state):
        _reject(event, f"round {event.round} has not been opened", out)
        return state
    if event.base != state.base:
        trained = f"it was trained from the weights {event.base}, round {event.round} began with"
        _reject(event, f"{trained} {state.base}", out)
        return state
    held = state.received.get(worker)
    if held is not None:
        return _again(state, worker, held, event, out)
    weight = _weight(state, event, out)
    if state.phase is not Phase.COMMITTING:  # else it is late, once the commit is on disk
        out.append(Fold(handle, worker, weight, _max_norm(state)))
    return state.of(worker, received=state.received.insert(worker, Received(handle, weight)))


def _reject(event: Arrived, reason: str, out: Effects) -> None:
    """Refuse an update of a round, or from weights, that this run does not have."""
    out += [
        Reject(event.handle, reason, "round"),
        _judged(event.worker, event.round, event.base, reason, "round"),
    ]


def _judged(worker: str, number: int, base: str, reason: str, cause: Cause) -> Judge:
    return Judge(worker, number, base, "rejected", reason, cause, train_again=True)


def _weight(state: State, event: Arrived, out: Effects) -> int:
    """Return the weight of an update: what it says, within what its worker announced."""
    claimed = event.num_examples
    limit = state.announced.get(event.worker)
    if limit is None:  # it is gone, and we never heard it
        limit = max(state.announced.values(), default=claimed)
    if state.rules.max_examples is not None:
        limit = min(limit, state.rules.max_examples)
    if claimed > limit:
        overweight = run_events.Overweight(
            worker=event.worker, round=event.round, num_examples=claimed, limit=limit
        )
        out.append(Record(overweight))
    return min(claimed, limit)


def _max_norm(state: State) -> float:
    """Return the largest norm that an update may have to be counted."""
    ratio = state.rules.max_norm_ratio
    if ratio is None:
        return math.inf
    middle = state.median_norm
    if not middle:  # the first round has only itself
        norms = [update.norm for update in state.received.values() if update.folded]
        middle = median(norms) if len(norms) >= 2 else math.inf
    return ratio * middle


def _of_an_earlier_round(state: State, event: Arrived, out: Effects) -> State:
    worker, number = event.worker, event.round
    out.append(Ack(event.handle))
    if worker in state.counted_before.get(number, ()):
        out.append(Record(run_events.Duplicate(worker=worker, round=number)))
    else:
        out.append(_late(worker, number, event.num_examples))
        out.append(_too_late(worker, number, event.base))
    return state


def _too_late(worker: str, number: int, base: str) -> Judge:
    return Judge(worker, number, base, "late", f"round {number} was committed without it")


def _late(worker: str, number: int, num_examples: int) -> Record:
    return Record(run_events.Late(worker=worker, round=number, num_examples=num_examples))


def _takes(state: State) -> bool:
    """Whether updates of ``state.round`` can exist: it has a base and is not past the last."""
    return state.has_weights and state.phase is not Phase.EVALUATING


def _again(state: State, worker: str, held: Received, event: Arrived, out: Effects) -> State:
    """Take another copy of an update that we hold: never folded twice, never lost.

    Where we still hold the very delivery that was folded, a copy is not needed. Where that one is
    void, or not folded yet, we cannot know which copy is sound, and keep them all.
    """
    if held.folded and held.handle.link == event.handle.link:
        out.append(Ack(event.handle))
        return state
    update = held._replace(spares=(*held.spares, event.handle))
    return state.of(worker, received=state.received.insert(worker, update))


def _folded(state: State, event: Folded, out: Effects) -> State:
    worker, held = event.worker, state.received[event.worker]
    update = Received(held.handle, held.num_examples, True, held.spares, event.norm)
    if held.spares and held.handle.link == state.link:
        out.extend(Ack(spare) for spare in held.spares)
        update = Received(held.handle, held.num_examples, True, (), event.norm)
    asked = state.asked
    if state.phase is Phase.OPEN and worker not in asked:
        asked = asked.insert(worker, -math.inf)
    state = state.of(
        worker,
        received=state.received.insert(worker, update),
        folded=state.folded + 1,
        asked=asked,
        failed=state.failed.discard(worker),
        doubted=state.doubted.discard(worker),
    )
    counted = run_events.Counted(
        worker=worker,
        round=state.round,
        num_examples=held.num_examples,
        updates=state.folded,
        needed=state.needed,
        train_s=event.train_s,
        bytes=event.size_bytes,
    )
    out.append(Record(counted))
    return state


def _fold_failed(state: State, event: FoldFailed, out: Effects) -> State:
    worker, held = event.worker, state.received[event.worker]
    if event.again:
        resend = run_events.Resend(worker=worker, reason=event.reason)
        out += [Ack(held.handle), Record(resend)]
    else:
        out.append(Reject(held.handle, event.reason, event.cause))
    if held.spares:
        first, *rest = held.spares
        update = held._replace(handle=first, spares=tuple(rest))
        if state.phase is not Phase.COMMITTING:  # then it would get into the next round's sum
            out.append(Fold(first, worker, held.num_examples, _max_norm(state)))
        return state.of(worker, received=state.received.insert(worker, update))
    state = state.of(worker, received=state.received.discard(worker))
    if not event.again:  # asked again, it would send the same again: if it was the worker at all
        out.append(_judged(worker, state.round, state.base, event.reason, event.cause))
        state = state.but(
            doubted=state.doubted.insert(worker, event.reason),
            # So when it is asked again, that is another attempt.
            attempts=state.attempts.insert(worker, state.attempts.get(worker, 0) + 1),
        )
        return membership.settle_doubt(state, worker)
    if worker in state.workers and state.phase is Phase.OPEN:
        out += work(state, (worker,))
    return state


def _evaluation(state: State, event: EvaluationArrived, _: Effects) -> State:
    wanted = (state.run, state.round - 1, state.base)
    if (event.run, event.round, event.base) != wanted or not state.evaluate_pending:
        return state  # its model's line is written already; late is only late
    evaluations = state.evaluations.insert(event.worker, event.evaluated)
    return state.of(event.worker, evaluations=evaluations)


def _committed(state: State, event: Committed, out: Effects) -> State:
    late, participants = {}, frozenset(n for n, one in state.received.items() if one.folded)
    for handle, worker, num_examples in _deliveries(state):
        out.append(Ack(handle))
        if worker not in participants:
            late[worker] = _late(worker, event.round, num_examples)
    out += late.values()
    out += [_too_late(worker, event.round, state.base) for worker in late]
    committed = run_events.Committed(
        round=event.round,
        participants=tuple(sorted(participants)),
        num_examples=event.num_examples,
        timings=event.timings,
    )
    out.append(Record(committed))
    recent = {n: who for n, who in state.counted_before.items() if n > event.round - _REMEMBERED}
    return _next_round(state, event, {**recent, event.round: participants})


def _deliveries(state: State) -> tuple[tuple[Handle, str, int], ...]:
    """Return every delivery of an update of this round that we hold."""
    return tuple(
        sorted(
            (handle, worker, update.num_examples)
            for worker, update in state.received.items()
            for handle in (update.handle, *update.spares)
        )
    )


def _next_round(
    state: State, event: Committed, counted_before: Mapping[int, frozenset[str]]
) -> State:
    return state.but(
        counted_before=counted_before,
        phase=Phase.WAITING,
        round=event.round + 1,
        base=event.base,
        enough=event.enough,
        evaluate_pending=True,
        evaluations=Table(),
        received=Table(),
        folded=0,
        asked=Table(),
        asked_before=frozenset(),
        attempts=Table(),
        failed=Table(),
        doubted=Table(),
        tally=Tally(),
        quorum_at=None,
        reopenings=0,
        reopened_with=0,
        gate=1,
        waiting_since=event.now,
    )


_TAKE: Mapping[type[Event], Callable[[State, Any, Effects], State]] = {
    Connected: _connected,
    Disconnected: _disconnected,
    Echoed: _echoed,
    Seen: membership.seen,
    Left: membership.left,
    Failed: membership.failed,
    InitLost: _init_lost,
    WeightsReady: _weights_ready,
    Arrived: _arrived,
    Folded: _folded,
    FoldFailed: _fold_failed,
    EvaluationArrived: _evaluation,
    Committed: _committed,
    Tick: membership.tick,
}
