"""The life of a run as a pure state machine: events in, effects out.

``advance(state, event)`` returns the next state and what is to be done. No IO, no clock, no arrays:
time comes in as ``now`` (seconds of any monotonic clock), updates are known by a ``Handle``, and
the shell around it (``service``) does what the effects say. So every interleaving of joins, leaves,
crashes, redeliveries and deadlines can be tried in tests, thousands a second.

::

    WAITING ──enough workers──> OPEN ──quorum (+ grace)──> COMMITTING ──Committed──> WAITING (next)
                                  └──deadline: reopen │ close │ stop                   │ after the
    ENDED <──all have evaluated, or deadline── EVALUATING <────────────────────────────┘ last round

A round may open as soon as the one before it is averaged (``Averaged``), while that is still being
written (``State.saving``), as at most ``progress.AHEAD`` are. Should a crash take an average back,
what was trained from it is told apart by its ``base`` and refused.

The rules that hold whatever happens, which the tests check under random interleavings:

1. Rounds are committed in order, each once.
2. An update, known by (run, round, worker), is folded at most once; a copy of it is only held.
3. The last copy of a folded update is acknowledged only after the commit of its round is on disk.
4. Every delivery ends acknowledged, or rejected with a reason; what is late is said to be late.
5. Time alone leads to progress or to a declared stop; time without a link does not count.

This file takes the events in; ``progress`` has what follows from the state they lead to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fluffle_coordinator.effects import Ack, Fold, Refuse, Reject, Tell, Welcome
from fluffle_coordinator.events import (
    Arrived,
    Averaged,
    Committed,
    Connected,
    Disconnected,
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
from fluffle_coordinator.progress import AHEAD, Effects, progress, tell_of_round, wakeup, work
from fluffle_coordinator.run_state import Handle, Phase, Received, Rules, Saving, State, Worker

__all__ = ["advance", "start", "wakeup"]

_V = TypeVar("_V")


def start(
    rules: Rules,
    run: str,
    now: float,
    *,
    committed: int = 0,
    participants: Iterable[str] = (),
    evaluated: bool = True,
    has_weights: bool = False,
    base: str = "",
    classes: tuple[str, ...] | None = None,
) -> State:
    """Return the state in which a coordinator starts, or starts again.

    Args:
        rules: what the operator decided.
        run: the run's id.
        now: the time.
        committed: the last round on disk; 0 for a new run.
        participants: who took part in it.
        evaluated: whether its model's evaluation is on disk.
        has_weights: whether there are weights to begin with.
        base: what they are named.
        classes: the classes that workers must have; None lets the first worker say.
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
        met=frozenset(participants),
        classes=classes,
        gate=rules.min_workers,
        gate_until=now + slowest if resumed else math.inf,
        waiting_since=now,
        unlinked_since=now,
    )


def advance(state: State, event: Event) -> tuple[State, Effects]:
    """Take one event; return the next state and what is to be done, in this order."""
    if state.phase is Phase.ENDED:
        return state, []
    out: Effects = []
    state = _TAKE[type(event)](state, event, out)
    return progress(state, event.now, out), out


# --- one function an event ---------------------------------------------------------------------


def _connected(state: State, event: Connected, out: Effects) -> State:
    out.append(Tell("connected" if state.link == 0 and not state.workers else "reconnected"))
    # The outage counts for nothing: nobody could be heard of, and updates wait in the broker.
    outage_s = event.now - state.unlinked_since if state.link == 0 else 0.0
    workers = {n: replace(w, last_seen=event.now) for n, w in state.workers.items()}
    # What was being sent has an unknown outcome: whoever is idle at its next sign of life is sent
    # the work again. And every delivery that we hold is void: it will come again.
    for update in state.received.values():
        out.extend(Ack(spare) for spare in update.spares)
    return state.but(
        link=event.link,
        workers=workers,
        asked=dict.fromkeys(state.asked, -math.inf),
        received={w: update._replace(spares=()) for w, update in state.received.items()},
        init_asked=None,
        opened_at=state.opened_at + outage_s,
        quorum_at=None if state.quorum_at is None else state.quorum_at + outage_s,
        waiting_since=state.waiting_since + outage_s,
        gate_until=state.gate_until + outage_s,
    )


def _disconnected(state: State, event: Disconnected, _: Effects) -> State:
    return state.but(link=0, unlinked_since=event.now) if state.link else state


def _seen(state: State, event: Seen, out: Effects) -> State:
    worker = event.worker
    if state.classes is None and worker.classes:
        state = state.but(classes=worker.classes)
        out.append(Tell("classes", {"worker": worker.name, "classes": list(worker.classes)}))
    if state.classes is not None and worker.classes != state.classes:
        reason = (
            f"worker {worker.name} has the classes {', '.join(worker.classes) or 'none'}, "
            f"the federation has {', '.join(state.classes)}; give --classes, or other data"
        )
        out += [
            Refuse(worker.name, worker.session, reason),
            Tell("refused", {"worker": worker.name, "reason": reason}),
        ]
        return state
    known = state.workers.get(worker.name)
    restarted = known is None or known.session != worker.session
    if restarted:
        out.append(Tell("joined", {"worker": worker.name, "num_examples": worker.num_examples}))
    if restarted or event.hello:
        out.append(Welcome(worker.name))
        state = state.but(failed=_minus(state.failed, [worker.name]))
        if state.init_asked == worker.name:  # a process that has just begun emptied its inbox
            state = state.but(init_asked=None)
    state = state.but(workers={**state.workers, worker.name: worker}, met=state.met | {worker.name})
    state = _settle_doubt(state, worker.name)
    return _offer(state, worker, event, restarted or event.hello, out)


def _offer(state: State, worker: Worker, event: Seen, fresh: bool, out: Effects) -> State:
    """Send the open work to a worker that lacks it: it is new, or came back, or it was lost."""
    name = worker.name
    answered = state.received if state.phase is Phase.OPEN else state.evaluations
    if state.phase not in (Phase.OPEN, Phase.EVALUATING) or name in answered:
        return state
    if name in state.failed:
        return state
    sent_at = state.asked.get(name)
    if sent_at is None and state.rules.fraction < 1 and state.phase is Phase.OPEN:
        return state  # not chosen for this round
    broken_off = event.hello and worker.state == "receiving"  # the rest was lost with its link
    if state.busy(name) and not broken_off:
        # An earlier coordinator asked it, or it came back: either way we wait for it.
        return state.but(asked={name: event.now, **state.asked})
    patience = state.rules.resend_s * (
        4 if state.done(name) else 1
    )  # its update may just be under way
    if sent_at is None or fresh or event.now - sent_at >= patience:
        state = state.but(asked={**state.asked, name: event.now})
        out.append(work(state, (name,)))
    return state


def _left(state: State, event: Left, out: Effects) -> State:
    known = state.workers.get(event.worker)
    if known is None or known.session != event.session:
        return state
    out.append(Tell("left", {"worker": event.worker, "reason": event.reason}))
    return _without(state, [event.worker])


def _init_lost(state: State, event: InitLost, _: Effects) -> State:
    return state.but(init_asked=None) if event.worker == state.init_asked else state


def _weights_ready(state: State, event: WeightsReady, _: Effects) -> State:
    return state.but(has_weights=True, base=event.base)


def _failed(state: State, event: Failed, out: Effects) -> State:
    out.append(
        Tell("failure", {"worker": event.worker, "round": event.round, "reason": event.reason})
    )
    if event.run != state.run:
        return state
    if event.worker == state.init_asked and event.round == 0:
        state = state.but(init_asked=None)
    elif event.round != state.at_work_on or event.worker not in state.asked:
        return state
    return state.but(failed={**state.failed, event.worker: event.reason})


def _arrived(state: State, event: Arrived, out: Effects) -> State:
    handle, worker = event.handle, event.worker
    if event.run != state.run:
        out.append(Reject(handle, f"it is of run {event.run}, this is run {state.run}", "run"))
        return state
    if event.round < state.round:
        return _of_an_earlier_round(state, event, out)
    if event.round > state.round or not _takes(state):
        out.append(Reject(handle, f"round {event.round} has not been opened", "round"))
        return state
    if event.base != state.base:
        told = f"it was trained from the weights {event.base}, round {event.round} began with"
        out.append(Reject(handle, f"{told} {state.base}", "round"))
        return state
    held = state.received.get(worker)
    if held is not None:
        return _again(state, worker, held, event, out)
    if state.phase is not Phase.COMMITTING:  # else it is late, once the commit is on disk
        out.append(Fold(handle, worker))
    update = Received(handle, event.num_examples)
    return state.but(received={**state.received, worker: update})


def _of_an_earlier_round(state: State, event: Arrived, out: Effects) -> State:
    worker, number = event.worker, event.round
    if number in [saving.round for saving in state.saving]:
        return _held_too(state, event)
    out.append(Ack(event.handle))
    if worker in state.counted_before.get(number, ()):
        out.append(Tell("duplicate", {"worker": worker, "round": number}))
    else:
        out.append(_late(worker, number, event.num_examples))
    return state


def _held_too(state: State, event: Arrived) -> State:
    """Hold what comes of a round that is being written: only then may it be let go of."""
    one = (event.handle, event.worker, event.num_examples)
    saving = tuple(
        saving._replace(held=(*saving.held, one)) if saving.round == event.round else saving
        for saving in state.saving
    )
    return state.but(saving=saving)


def _late(worker: str, number: int, num_examples: int) -> Tell:
    return Tell("late", {"worker": worker, "round": number, "num_examples": num_examples})


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
    return state.but(received={**state.received, worker: update})


def _folded(state: State, event: Folded, out: Effects) -> State:
    worker, held = event.worker, state.received[event.worker]
    update = Received(held.handle, held.num_examples, True, held.spares)
    if held.spares and held.handle.link == state.link:
        out.extend(Ack(spare) for spare in held.spares)
        update = Received(held.handle, held.num_examples, True)
    asked = state.asked
    if state.phase is Phase.OPEN and worker not in asked:
        asked = {**asked, worker: -math.inf}
    state = state.but(
        received={**state.received, worker: update},
        folded=state.folded + 1,
        asked=asked,
        failed=_minus(state.failed, [worker]),
        doubted=_minus(state.doubted, [worker]),
    )
    told = {
        "worker": worker,
        "round": state.round,
        "num_examples": held.num_examples,
        "updates": state.folded,
        "needed": state.needed,
        "train_s": event.train_s,
        "bytes": event.size_bytes,
    }
    return tell_of_round(state, Tell("counted", told), out)


def _fold_failed(state: State, event: FoldFailed, out: Effects) -> State:
    worker, held = event.worker, state.received[event.worker]
    if event.again:
        out += [Ack(held.handle), Tell("resend", {"worker": worker, "reason": event.reason})]
    else:
        out.append(Reject(held.handle, event.reason, event.cause))
    if held.spares:
        first, *rest = held.spares
        update = held._replace(handle=first, spares=tuple(rest))
        if state.phase is not Phase.COMMITTING:  # then it would get into the next round's sum
            out.append(Fold(first, worker))
        return state.but(received={**state.received, worker: update})
    state = state.but(received=_minus(state.received, [worker]))
    if not event.again:  # asked again, it would send the same again: if it was the worker at all
        doubted = {**state.doubted, worker: event.reason}
        return _settle_doubt(state.but(doubted=doubted), worker)
    if worker in state.workers and state.phase is Phase.OPEN:
        out.append(work(state, (worker,)))
    return state


def _settle_doubt(state: State, worker: str) -> State:
    """Count a worker as failed where it says that it sent what was found unsound.

    While it is still at work, somebody else sent that in its name, and its own update is to come.
    """
    if worker not in state.doubted or not state.done(worker):
        return state
    return state.but(
        failed={**state.failed, worker: state.doubted[worker]},
        doubted=_minus(state.doubted, [worker]),
    )


def _evaluation(state: State, event: EvaluationArrived, _: Effects) -> State:
    wanted = (state.run, state.round - 1, state.base)
    if (event.run, event.round, event.base) != wanted or not state.evaluate_pending:
        return state  # its model's line is written already; late is only late
    return state.but(evaluations={**state.evaluations, event.worker: event.evaluated})


def _averaged(state: State, event: Averaged, _: Effects) -> State:
    if event.round >= state.rules.rounds:
        return state  # there is no next round, and the end waits for the disk
    saving = Saving(event.round, _deliveries(state))
    return _next_round(state, event).but(saving=(*state.saving, saving))


def _committed(state: State, event: Committed, out: Effects) -> State:
    told: tuple[Tell, ...] = ()
    if state.saving and state.saving[0].round == event.round:
        held, told = state.saving[0].held, state.saving[0].told
        # What could not end before this begins to wait for its end now.
        state = state.but(saving=state.saving[1:], opened_at=event.now)
    else:
        held = _deliveries(state)
        state = _next_round(state, event)
    late = {}
    for handle, worker, num_examples in held:
        out.append(Ack(handle))
        if worker not in event.participants:
            late[worker] = _late(worker, event.round, num_examples)
    out += late.values()
    of = {"round": event.round, "participants": sorted(event.participants)}
    out.append(Tell("committed", {**of, **event.about}))
    out += told
    recent = {n: who for n, who in state.counted_before.items() if n >= event.round - AHEAD}
    return state.but(counted_before={**recent, event.round: event.participants})


def _deliveries(state: State) -> tuple[tuple[Handle, str, int], ...]:
    """Return every delivery of an update of this round that we hold."""
    return tuple(
        (handle, worker, update.num_examples)
        for worker, update in state.received.items()
        for handle in (update.handle, *update.spares)
    )


def _next_round(state: State, event: Averaged | Committed) -> State:
    return state.but(
        phase=Phase.WAITING,
        round=event.round + 1,
        base=event.base,
        evaluate_pending=True,
        evaluations={},
        received={},
        folded=0,
        asked={},
        failed={},
        doubted={},
        quorum_at=None,
        reopenings=0,
        reopened_with=0,
        gate=1,
        waiting_since=event.now,
    )


def _tick(state: State, event: Tick, out: Effects) -> State:
    if not state.link:
        return state
    now = event.now
    gone = [w for w in state.workers.values() if w.deadline(state.rules) <= now]
    for worker in gone:
        silent_s = round(now - worker.last_seen, 1)
        out.append(Tell("gone", {"worker": worker.name, "silent_s": silent_s}))
    return _without(state, [worker.name for worker in gone])


def _without(state: State, names: list[str]) -> State:
    """Forget workers that are not there any more."""
    init_asked = None if state.init_asked in names else state.init_asked
    return state.but(workers=_minus(state.workers, names), init_asked=init_asked)


def _minus(mapping: Mapping[str, _V], names: Iterable[str]) -> Mapping[str, _V]:
    lost = mapping.keys() & names
    return {key: value for key, value in mapping.items() if key not in lost} if lost else mapping


_TAKE: Mapping[type[Event], Callable[[State, Any, Effects], State]] = {
    Connected: _connected,
    Disconnected: _disconnected,
    Seen: _seen,
    Left: _left,
    Failed: _failed,
    InitLost: _init_lost,
    WeightsReady: _weights_ready,
    Arrived: _arrived,
    Folded: _folded,
    FoldFailed: _fold_failed,
    EvaluationArrived: _evaluation,
    Averaged: _averaged,
    Committed: _committed,
    Tick: _tick,
}
