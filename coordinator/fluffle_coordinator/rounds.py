"""The life of a run as a pure state machine: events in, effects out.

``advance(state, event)`` returns the next state and what is to be done. No IO, no clock, no arrays:
time comes in as ``now`` (seconds of any monotonic clock), updates are known by a ``Handle``, and
the shell around it (``service``) does what the effects say. So every interleaving of joins, leaves,
crashes, redeliveries and deadlines can be tried in tests, thousands a second.

::

    WAITING ──enough workers──> OPEN ──quorum (+ grace)──> COMMITTING ──Committed──> WAITING (next)
                                  └──deadline: reopen │ close │ stop                   │ after the
    ENDED <──all have evaluated, or deadline── EVALUATING <────────────────────────────┘ last round

The rules that hold whatever happens, which the tests check under random interleavings:

1. Rounds are committed in order, each once.
2. An update, known by (run, round, worker), is folded at most once; seen again, it only swaps the
   delivery that will be acknowledged.
3. A folded update's delivery is acknowledged only after the commit of its round is on disk.
4. Every delivery ends acknowledged, or rejected with a reason; what is late is said to be late.
5. Time alone leads to progress or to a declared stop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from fluffle_coordinator.run_state import (
    Ack,
    Arrived,
    AskInit,
    Commit,
    Committed,
    Connected,
    Disconnected,
    Effect,
    End,
    EvaluationArrived,
    Event,
    Failed,
    Fold,
    Folded,
    FoldFailed,
    Left,
    Outcome,
    Phase,
    Received,
    RecordEvaluation,
    Refuse,
    Reject,
    Rules,
    Seen,
    SendEvaluate,
    SendFit,
    State,
    Tell,
    Tick,
    WeightsReady,
    Welcome,
    Worker,
)

Effects = list[Effect]


def start(
    rules: Rules,
    run: str,
    now: float,
    *,
    committed: int = 0,
    participants: Iterable[str] = (),
    evaluated: bool = True,
    has_weights: bool = False,
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
        classes: the classes that workers must have; None lets the first worker say.
    """
    resumed = has_weights and committed > 0
    # Every living worker speaks up in this time, if it keeps the default of a heartbeat in 2 s.
    slowest = 2.0 * rules.patience
    return State(
        rules=rules,
        run=run,
        round=committed + 1,
        counted_before=frozenset(participants),
        evaluate_pending=not evaluated,
        has_weights=has_weights,
        classes=classes,
        gate=rules.min_workers,
        gate_until=now + slowest if resumed else math.inf,
        waiting_since=now,
    )


def advance(  # noqa: PLR0912 - one branch an event
    state: State, event: Event
) -> tuple[State, Effects]:
    """Take one event; return the next state and what is to be done, in this order."""
    if state.phase is Phase.ENDED:
        return state, []
    out: Effects = []
    now = event.now
    match event:
        case Connected():
            state = _connected(state, event, out)
        case Disconnected():
            state = replace(state, link=0)
        case Seen():
            state = _seen(state, event, out)
        case Left(_, worker, session, reason):
            known = state.workers.get(worker)
            if known is not None and known.session == session:
                out.append(Tell("left", {"worker": worker, "reason": reason}))
                state = _without(state, [worker])
        case Failed():
            state = _failed(state, event, out)
        case WeightsReady():
            state = replace(state, has_weights=True)
        case Arrived():
            state = _arrived(state, event, out)
        case Folded(_, worker):
            state = _folded(state, worker, out)
        case FoldFailed():
            state = _fold_failed(state, event, out)
        case EvaluationArrived():
            state = _evaluation(state, event, out)
        case Committed():
            state = _committed(state, event, out)
        case Tick():
            state = _gone(state, now, out)
    return _progress(state, now, out), out


def wakeup(state: State) -> float:
    """Return when a ``Tick`` is due at the latest; infinity where nothing waits for time."""
    rules = state.rules
    times = [worker.deadline(rules) for worker in state.workers.values()]
    if state.phase is Phase.WAITING:
        times += [state.waiting_since + rules.wait_s, state.gate_until]
    elif state.phase in (Phase.OPEN, Phase.EVALUATING):
        times.append(state.opened_at + rules.deadline_s)
        if state.quorum_at is not None:
            times.append(state.quorum_at + rules.grace_s)
    return min(times, default=math.inf) if state.link else math.inf


def select(workers: Iterable[str], fraction: float, seed: int, number: int) -> tuple[str, ...]:
    """Choose a fraction of the workers, the same for the same seed and round.

    Each worker draws a lot from (seed, number of the round, name) and the lowest are asked
    (rendezvous hashing), so that one worker's leaving does not reshuffle the others.

    Example:
        >>> len(select(["a", "b", "c", "d"], 0.5, seed=0, number=1))
        2
    """
    names = sorted(workers)
    count = max(1, math.ceil(fraction * len(names) - 1e-9))
    if count >= len(names):
        return tuple(names)

    def lot(name: str) -> bytes:
        return sha256(f"{seed}/{number}/{name}".encode()).digest()

    return tuple(sorted(sorted(names, key=lot)[:count]))


# --- one function an event ---------------------------------------------------------------------


def _connected(state: State, event: Connected, out: Effects) -> State:
    out.append(Tell("connected" if state.link == 0 and not state.workers else "reconnected"))
    # Nobody could be heard of during an outage, and what was being sent has an unknown outcome:
    # whoever is idle at its next sign of life is sent the work again.
    workers = {n: replace(w, last_seen=event.now) for n, w in state.workers.items()}
    asked = dict.fromkeys(state.asked, -math.inf)
    return replace(state, link=event.link, workers=workers, asked=asked, init_asked=None)


def _seen(state: State, event: Seen, out: Effects) -> State:
    worker = event.worker
    if state.classes is None and worker.classes:
        state = replace(state, classes=worker.classes)
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
    state = replace(state, workers={**state.workers, worker.name: worker})
    if event.hello and worker.name in state.failed:
        state = replace(state, failed=_minus(state.failed, [worker.name]))
    return _offer(state, worker, event, out)


def _offer(state: State, worker: Worker, event: Seen, out: Effects) -> State:
    """Send the open work to a worker that lacks it: it is new, or came back, or it was lost."""
    name = worker.name
    answered = state.received if state.phase is Phase.OPEN else state.evaluations
    if state.phase not in (Phase.OPEN, Phase.EVALUATING) or name in answered:
        return state
    if name in state.failed or state.busy(name):
        return state
    sent_at = state.asked.get(name)
    if sent_at is None and state.rules.fraction < 1 and state.phase is Phase.OPEN:
        return state  # not chosen for this round
    done = (worker.run, worker.round) == (state.run, state.round)
    patience = state.rules.resend_s * (4 if done else 1)  # its update may just be under way
    if sent_at is None or event.hello or event.now - sent_at >= patience:
        state = replace(state, asked={**state.asked, name: event.now})
        out.append(_work(state, (name,)))
    return state


def _failed(state: State, event: Failed, out: Effects) -> State:
    out.append(
        Tell("failure", {"worker": event.worker, "round": event.round, "reason": event.reason})
    )
    if event.run != state.run:
        return state
    if event.worker == state.init_asked and event.round == 0:
        state = replace(state, init_asked=None)
    elif event.round != state.round or event.worker not in state.asked:
        return state
    state = replace(state, failed={**state.failed, event.worker: event.reason})
    if state.rules.quorum.number is None and event.worker not in state.received:
        state = replace(state, asked=_minus(state.asked, [event.worker]))
    return state


def _arrived(state: State, event: Arrived, out: Effects) -> State:
    handle, worker = event.handle, event.worker
    if event.run != state.run:
        out.append(Reject(handle, f"it is of run {event.run}, this is run {state.run}"))
        return state
    if event.round > state.round or (event.round == state.round and not _takes(state)):
        out.append(Reject(handle, f"round {event.round} has not been opened"))
        return state
    held = state.received.get(worker) if event.round == state.round else None
    if held is not None:
        return _again(state, worker, held, event, out)
    if event.round == state.round and state.phase is not Phase.COMMITTING:
        update = Received(handle, event.num_examples)
        out.append(Fold(handle, worker))
        return replace(state, received={**state.received, worker: update})
    out.append(Ack(handle))
    if event.round == state.round - 1 and worker in state.counted_before:
        out.append(Tell("duplicate", {"worker": worker, "round": event.round}))
    else:
        out.append(Tell("late", {"worker": worker, "round": event.round}))
    return state


def _takes(state: State) -> bool:
    """Whether updates of ``state.round`` can exist: it has a base and is not past the last."""
    return state.has_weights and state.phase is not Phase.EVALUATING


def _again(state: State, worker: str, held: Received, event: Arrived, out: Effects) -> State:
    """Take another copy of an update that we hold: never folded twice, never lost."""
    if held.handle.link < event.handle.link:  # the old delivery is void, this is its redelivery
        update = replace(held, handle=event.handle)
    elif held.folded:
        out.append(Ack(event.handle))
        return state
    else:  # which of the two is sound is not known before the first is folded
        update = replace(held, spares=(*held.spares, event.handle))
    return replace(state, received={**state.received, worker: update})


def _folded(state: State, worker: str, out: Effects) -> State:
    held = state.received[worker]
    out.extend(Ack(spare) for spare in held.spares)
    update = replace(held, folded=True, spares=())
    asked = state.asked if worker in state.asked else {**state.asked, worker: -math.inf}
    state = replace(state, received={**state.received, worker: update}, asked=asked)
    out.append(
        Tell(
            "counted",
            {
                "worker": worker,
                "round": state.round,
                "num_examples": held.num_examples,
                "updates": state.folded,
                "needed": state.needed,
            },
        )
    )
    return state


def _fold_failed(state: State, event: FoldFailed, out: Effects) -> State:
    held = state.received[event.worker]
    if event.again:
        out += [Ack(held.handle), Tell("resend", {"worker": event.worker, "reason": event.reason})]
    else:
        out.append(Reject(held.handle, event.reason))
    received = _minus(state.received, [event.worker])
    if held.spares:
        first, *rest = held.spares
        received[event.worker] = replace(held, handle=first, spares=tuple(rest))
        out.append(Fold(first, event.worker))
    elif event.again and event.worker in state.workers and state.phase is Phase.OPEN:
        out.append(_work(state, (event.worker,)))
    return replace(state, received=received)


def _evaluation(state: State, event: EvaluationArrived, out: Effects) -> State:
    wanted = (state.run, state.round - 1)
    if (event.run, event.round) != wanted or not state.evaluate_pending:
        return state  # its model's line is written already; late is only late
    return replace(state, evaluations={**state.evaluations, event.worker: event.evaluated})


def _committed(state: State, event: Committed, out: Effects) -> State:
    for worker, update in state.received.items():
        out += [Ack(handle) for handle in (update.handle, *update.spares)]
        if worker not in event.participants:
            out.append(Tell("late", {"worker": worker, "round": event.round}))
    out.append(
        Tell("committed", {"round": event.round, "participants": sorted(event.participants)})
    )
    return replace(
        state,
        phase=Phase.WAITING,
        round=event.round + 1,
        counted_before=event.participants,
        evaluate_pending=True,
        evaluations={},
        received={},
        asked={},
        failed={},
        quorum_at=None,
        reopenings=0,
        reopened_with=0,
        gate=1,
        waiting_since=event.now,
    )


def _gone(state: State, now: float, out: Effects) -> State:
    if not state.link:
        return state
    gone = [w for w in state.workers.values() if w.deadline(state.rules) <= now]
    for worker in gone:
        silent_s = round(now - worker.last_seen, 1)
        out.append(Tell("gone", {"worker": worker.name, "silent_s": silent_s}))
    return _without(state, [worker.name for worker in gone])


def _without(state: State, names: list[str]) -> State:
    """Forget workers; one that is not there does not count for a quorum that is a fraction."""
    state = replace(state, workers=_minus(state.workers, names))
    if state.init_asked in names:
        state = replace(state, init_asked=None)
    if state.rules.quorum.number is None or state.phase is Phase.EVALUATING:
        lost = [name for name in names if name not in state.received]
        state = replace(state, asked=_minus(state.asked, lost))
    return state


# --- what follows from the state, whatever the event was ---------------------------------------


def _progress(state: State, now: float, out: Effects) -> State:
    if not state.link or state.phase is Phase.ENDED:
        return state
    state = _record_evaluation(state, out)
    if state.phase is Phase.WAITING:
        return _try_to_open(state, now, out)
    if state.phase is Phase.OPEN:
        return _try_to_commit(state, now, out)
    if state.phase is Phase.EVALUATING:
        waited = now >= state.opened_at + state.rules.deadline_s
        if not state.evaluate_pending or not state.asked or waited:
            state = _record_evaluation(state, out, whole=False)
            return _end(state, "finished", f"{state.round - 1} rounds are done", out)
    return state


def _record_evaluation(state: State, out: Effects, *, whole: bool = True) -> State:
    """Write the evaluation of the last committed model, once all have sent theirs (``whole``)."""
    if not state.evaluate_pending or not state.evaluations:
        return state
    if whole and (not state.asked or not state.asked.keys() <= state.evaluations.keys()):
        return state
    out.append(RecordEvaluation(state.round - 1, state.evaluations))
    return replace(state, evaluate_pending=False)


def _try_to_open(state: State, now: float, out: Effects) -> State:
    present = sorted(state.workers)
    if state.round > state.rules.rounds:
        state = replace(
            state, phase=Phase.EVALUATING, opened_at=now, asked=dict.fromkeys(present, now)
        )
        if state.evaluate_pending and present:
            out.append(SendEvaluate(tuple(present)))
            return state
        return _end(state, "finished", f"{state.round - 1} rounds are done", out)
    if now >= state.waiting_since + state.rules.wait_s:
        told = f"{len(present)} of {state.gate} workers came in {state.rules.wait_s:.0f} s"
        return _end(state, "stopped", told, out)
    if not state.has_weights:
        return _try_to_init(state, present, out)
    if len(present) < (state.gate if now < state.gate_until else 1):
        return state
    chosen = select(present, state.rules.fraction, state.rules.seed, state.round)
    asked = dict.fromkeys(chosen, now) | dict.fromkeys(state.received, -math.inf)
    state = replace(state, phase=Phase.OPEN, opened_at=now, asked=asked, gate=1)
    out.append(
        Tell("opened", {"round": state.round, "asked": sorted(asked), "needed": state.needed})
    )
    waiting = tuple(name for name in chosen if name not in state.received)
    if waiting:
        out.append(_work(state, waiting))
    return _try_to_commit(state, now, out)


def _try_to_init(state: State, present: list[str], out: Effects) -> State:
    if state.init_asked is not None:
        return state
    able = [name for name in present if name not in state.failed]
    if able:
        out += [AskInit(able[0]), Tell("init", {"worker": able[0]})]
        return replace(state, init_asked=able[0])
    if present and len(present) >= state.gate:
        return _end(state, "stopped", f"no first weights: {_last(state.failed)}", out)
    return state


def _try_to_commit(state: State, now: float, out: Effects) -> State:
    if state.folded >= state.needed:
        quorum_at = now if state.quorum_at is None else state.quorum_at
        state = replace(state, quorum_at=quorum_at)
        everyone = all(w in state.received and state.received[w].folded for w in state.asked)
        if everyone or now >= quorum_at + state.rules.grace_s:
            return _commit(state, out)
        return state
    if state.failed and not state.received and not (state.asked.keys() - state.failed.keys()):
        told = f"every worker failed in round {state.round}; {_last(state.failed)}"
        return _end(state, "stopped", told, out)
    if now >= state.opened_at + state.rules.deadline_s:
        return _at_the_deadline(state, now, out)
    return state


def _commit(state: State, out: Effects) -> State:
    state = _record_evaluation(state, out, whole=False)
    out.append(Commit(state.round))
    return replace(state, phase=Phase.COMMITTING)


def _at_the_deadline(state: State, now: float, out: Effects) -> State:
    rules = state.rules
    told = (
        f"round {state.round} has {state.folded} of {state.needed} updates "
        f"after {rules.deadline_s:.0f} s, missing: {', '.join(state.missing) or 'nobody asked'}"
    )
    if rules.on_deadline == "stop":
        return _end(state, "stopped", told, out)
    if rules.on_deadline == "close" and state.folded >= rules.min_updates:
        out.append(Tell("closed", {"round": state.round, "reason": told}))
        return _commit(state, out)
    stuck = state.reopenings + 1 if state.folded == state.reopened_with else 1
    if stuck > rules.max_reopenings:
        return _end(state, "stopped", f"{told}; reopened {rules.max_reopenings} times", out)
    chosen = select(state.workers, rules.fraction, rules.seed, state.round)
    asked = dict.fromkeys(state.received, -math.inf) | dict.fromkeys(
        chosen if state.workers else (), now
    )
    lacking = tuple(n for n in chosen if n not in state.received and not state.busy(n))
    state = replace(
        state,
        opened_at=now,
        asked=asked,
        failed={},
        reopenings=stuck,
        reopened_with=state.folded,
    )
    out.append(Tell("reopened", {"round": state.round, "asked": sorted(asked), "reason": told}))
    if lacking:
        out.append(_work(state, lacking))
    return state


def _work(state: State, workers: tuple[str, ...]) -> Effect:
    if state.phase is Phase.EVALUATING:
        return SendEvaluate(workers)
    return SendFit(workers, evaluate=state.evaluate_pending)


def _end(state: State, outcome: Outcome, reason: str, out: Effects) -> State:
    out.append(End(outcome, reason, tuple(sorted(state.workers))))
    return replace(state, phase=Phase.ENDED, outcome=outcome, reason=reason)


def _last(failed: Mapping[str, str]) -> str:
    worker, reason = list(failed.items())[-1]
    return f"{worker}: {reason}"


def _minus(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    lost = set(names)
    return {key: value for key, value in mapping.items() if key not in lost}
