"""What follows from a run's state, whatever event led to it: opening, closing, ending.

The second half of the round machine (``machine``), as pure as the first: ``progress(state, now,
out)`` is called after every event, returns the next state and adds what is to be done to ``out``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.agreement import decide
from fluffle_coordinator.machine.effects import (
    AskInit,
    Commit,
    Effects,
    End,
    Opened,
    Record,
    RecordEvaluation,
)
from fluffle_coordinator.machine.hearing import clock
from fluffle_coordinator.machine.state import Issued, Outcome, Phase, State, Table, Worker
from fluffle_coordinator.machine.work import first_due, next_sequence, noted, work


def progress(state: State, now: float, out: Effects) -> State:
    """Take the steps that the state and the time allow; none where there is no link."""
    if not state.link:
        return state
    now = clock(state, now)
    if now >= state.gate_until:
        state = state.but(gate=1, gate_until=math.inf)
    match state.phase:
        case Phase.WAITING:
            past_the_last = state.round > state.rules.rounds or state.enough
            return (_evaluate_only if past_the_last else _try_to_open)(state, now, out)
        case Phase.OPEN:
            return _try_to_commit(_record_evaluation(state, out), now, out)
        case Phase.COMMITTING:
            return _record_evaluation(state, out)
        case Phase.EVALUATING:
            return _try_to_finish(state, now, out)
        case Phase.ENDED:
            return state


def wakeup(state: State) -> float:
    """Return when a ``Tick`` is due at the latest; infinity if nothing waits for time.

    What is due only after the clock stops waits for something to be heard.
    """
    if not state.link or state.phase is Phase.ENDED:
        return math.inf
    due = _due(state)
    return due if due <= state.heard_at + state.hearing_s else math.inf


def _due(state: State) -> float:
    rules = state.rules
    times = [state.gate_until, first_due(state) if math.isinf(state.due_at) else state.due_at]
    if state.quorum_at is not None:
        if state.phase is Phase.OPEN:
            times.append(state.schedule.wakeup(state))
            times.append(state.began_at + rules.max_round_s)
    elif state.phase is Phase.WAITING:
        times.append(state.waiting_since + rules.wait_s)
        if state.init_asked is not None and not state.has_weights:
            times.append(state.init_asked_at + rules.deadline_s)
    elif state.phase in (Phase.OPEN, Phase.EVALUATING):
        times.append(state.opened_at + rules.deadline_s)
        if state.phase is Phase.OPEN:
            times.append(state.began_at + rules.max_round_s)
    return min(times)


# --- before a round ----------------------------------------------------------------------------


def _try_to_open(state: State, now: float, out: Effects) -> State:
    if _has_enough(state):
        state = decide(state, out)  # which may refuse some
    if _has_enough(state) and state.has_weights:
        return _open(state, now, out)
    rules = state.rules
    if now >= state.waiting_since + rules.wait_s:
        reason = (
            "no first weights arrived"
            if _has_enough(state)
            else f"{len(state.workers)} of {wanted(state)} workers joined"
        )
        return _end(state, "stopped", f"{reason} in {rules.wait_s:.0f} s (--wait-workers)", out)
    return state if state.has_weights else _try_to_init(state, now, out)


def wanted(state: State) -> int:
    """Return how many workers must be present to open the next round."""
    count = state.gate
    while not state.rules.enough(count):
        count += 1
    return count


def _has_enough(state: State) -> bool:
    present = len(state.workers)
    return present >= state.gate and state.rules.enough(present)


def _try_to_init(state: State, now: float, out: Effects) -> State:
    if state.init_asked is not None:
        limit_s = state.rules.deadline_s
        if now < state.init_asked_at + limit_s:
            return state
        name, reason = state.init_asked, f"no first weights within {limit_s:.0f} s (--deadline)"
        out.append(Record(run_events.Failure(worker=name, round=0, reason=reason)))
        state = state.but(init_asked=None, failed=state.failed.insert(name, reason))
    here: Iterable[Worker] = state.workers.values()
    if not _has_enough(state):
        # Who decides on the model is yet to come; but whoever says nothing of it cannot differ.
        here = [worker for worker in here if _says_nothing(worker)]
        if not here:
            return state
    able = sorted(worker.name for worker in here if worker.name not in state.failed)
    if not able and not _has_enough(state):
        return state
    if able:
        # Whoever says what its model is made of was compared with the others.
        first = next((name for name in able if state.workers[name].model is not None), able[0])
        out += [AskInit(first), Record(run_events.Init(worker=first))]
        return state.but(init_asked=first, init_asked_at=now)
    return _end(state, "stopped", f"no first weights: {_last(state.failed)}", out)


def _says_nothing(worker: Worker) -> bool:
    return worker.model is None and not worker.classes


def _open(state: State, now: float, out: Effects) -> State:
    state = state.recounted(
        phase=Phase.OPEN,
        opened_at=now,
        began_at=now,
        due_at=-math.inf,
        asked=_at_work(state, now),
        failed=Table(),
        doubted=Table(),
        attempts=Table(),
        draws=1,
        gate=1,
        gate_until=math.inf,
    )
    state = next_sequence(state)
    chosen = state.schedule.cohort(state)
    issued = Issued(now, state.sequence, state.round)
    # Updates that were confirmed to an earlier coordinator may be here already.
    early = {} if state.schedule.continuous else _answered(state)
    asked = {**dict.fromkeys(chosen, issued), **early}
    state = noted(state.recounted(asked=Table({**state.asked, **asked})), chosen)
    opened = run_events.Opened(
        round=state.round,
        asked=tuple(sorted(state.asked)),
        needed=state.needed,
        deadline_s=state.rules.deadline_s,
    )
    out.append(Opened())
    waiting = tuple(name for name in chosen if name not in early)
    if waiting:
        state = work(state, waiting, now, out)
    out.append(Record(opened))
    return _try_to_commit(state, now, out)


def _at_work(state: State, now: float) -> Table[str, Issued]:
    """Return who goes on with what it was asked for before, where work outlives its round."""
    if not state.schedule.continuous:
        return Table()
    here = {worker.name: state.issued_before(worker, now) for worker in state.workers.values()}
    asked = {name: issued for name, issued in here.items() if issued}
    for name, issued in state.asked.items():
        sound = name not in state.doubted or state.busy(name)
        if name in state.workers and name not in state.failed and sound:
            asked[name] = issued
    return Table(asked)


def _answered(state: State) -> dict[str, Issued]:
    """Return who has answered the open round, as asked in it."""
    return {
        ticket.worker: Issued(-math.inf, ticket.sequence, state.round)
        for ticket, update in state.received.items()
        if update.round == state.round
    }


# --- an open round -----------------------------------------------------------------------------


def _try_to_commit(state: State, now: float, out: Effects) -> State:
    if state.quorum_at is None and state.folded >= state.needed:
        state = state.but(quorum_at=now)
    if state.quorum_at is not None:  # whoever is asked from now on does not undo the quorum
        too_long = now >= state.began_at + state.rules.max_round_s
        if too_long or state.schedule.closes(state, now):
            return _commit(state, out)
        return state
    if len(state.failed) >= len(state.asked) > 0 and _all_failed(state):
        reason = f"every worker failed in round {state.round}; {_last(state.failed)}"
        return _end(state, "stopped", reason, out)
    if now >= state.opened_at + state.rules.deadline_s:
        return _at_the_deadline(state, now, out)
    if now >= state.began_at + state.rules.max_round_s:
        return _end(state, "stopped", _too_long(state), out)
    return state


def _all_failed(state: State) -> bool:
    return not state.received and all(name in state.failed for name in state.asked)


def _too_long(state: State) -> str:
    return (
        f"{_standing(state, state.rules.max_round_s)}; no round may stay open longer (--max-round)"
    )


def _standing(state: State, seconds: float) -> str:
    named = ", ".join(state.missing)
    missing = f"missing: {named}" if named else "no other worker is connected"
    return (
        f"round {state.round} has {state.folded} of {state.needed} updates "
        f"after {seconds:.0f} s, {missing}"
    )


def _commit(state: State, out: Effects) -> State:
    state = _record_evaluation(state, out, whole=False)
    state = _tell_of_outliers(state, out)
    in_it = {ticket.worker for ticket in state.received}
    out.append(Commit(state.round, tuple(sorted({*state.asked, *state.asked_before, *in_it}))))
    return state.but(phase=Phase.COMMITTING)


def _tell_of_outliers(state: State, out: Effects) -> State:
    """Let people know of updates whose norm is far outside the round's distribution."""
    norms = {t: u.norm for t, u in state.received.items() if u.folded and u.norm > 0}
    if not norms:
        return state
    ratio, middle = state.rules.outlier_ratio, median(norms.values())
    if len(norms) <= 2 and state.median_norm:
        middle = state.median_norm  # two alone have no middle
    for (worker, _), norm in sorted(norms.items()):
        if norm > ratio * middle:
            outlier = run_events.Outlier(round=state.round, worker=worker, norm=norm, median=middle)
            out.append(Record(outlier))
    return state.but(median_norm=middle)


def _at_the_deadline(state: State, now: float, out: Effects) -> State:
    rules = state.rules
    reason = _standing(state, rules.deadline_s)
    if rules.on_deadline == "stop":
        return _end(state, "stopped", reason, out)
    if rules.on_deadline == "close" and state.folded >= rules.min_updates:
        out.append(Record(run_events.Closed(round=state.round, reason=reason)))
        return _commit(state, out)
    if now >= state.began_at + rules.max_round_s:
        return _end(state, "stopped", _too_long(state), out)
    if any(state.advancing(name) for name in state.missing):
        stuck = 0  # a long round is no dead one
    else:
        stuck = state.reopenings + 1 if state.folded == state.reopened_with else 1
    if stuck > rules.max_reopenings:
        reason = f"{reason}; reopened {rules.max_reopenings} times without progress (--deadline)"
        return _end(state, "stopped", reason, out)
    return _reopen(state.but(reopenings=stuck, reopened_with=state.folded), reason, now, out)


def _reopen(state: State, reason: str, now: float, out: Effects) -> State:
    continuous, answered = state.schedule.continuous, _answered(state)
    before = state.asked_before.union(state.asked)
    busy = {name for name in state.asked if state.busy(name)}
    if continuous:  # who is neither at work nor heard of has lost its work
        kept = {name: issued for name, issued in state.asked.items() if name in busy}
        state = state.recounted(asked=Table(kept))
    state = next_sequence(state)
    chosen = state.schedule.again(state)
    issued = Issued(now, state.sequence, state.round)
    asked = {**(state.asked if continuous else answered), **dict.fromkeys(chosen, issued)}
    state = state.recounted(
        opened_at=now,
        asked=Table(asked),
        asked_before=before,
        due_at=-math.inf,
        failed=Table(),
        doubted=Table(),
        draws=state.draws + 1,
    )
    state = noted(state, chosen)
    reopened = run_events.Reopened(
        round=state.round,
        asked=tuple(sorted(asked)),
        needed=state.needed,
        deadline_s=state.rules.deadline_s,
        reason=reason,
    )
    lacking = tuple(n for n in chosen if n not in answered and not state.busy(n))
    out.append(Record(reopened))
    if lacking:
        state = work(state, lacking, now, out)
    return state


# --- evaluations, and the end ------------------------------------------------------------------


def _record_evaluation(state: State, out: Effects, *, whole: bool = True) -> State:
    """Write the evaluation of the last committed model, once all have sent theirs (``whole``)."""
    if not state.evaluate_pending or not state.evaluations:
        return state
    # A worker's evaluation comes before its update, if it has one at all.
    if whole and (state.tally.unevaluated or not state.tally.expected):
        return state
    out.append(RecordEvaluation(state.round - 1, state.evaluations))
    return state.but(evaluate_pending=False)


def _evaluate_only(state: State, now: float, out: Effects) -> State:
    """No further round is wanted: ask for the evaluation of the last model, where it is wanted."""
    present = tuple(sorted(state.workers))
    asked = Table(dict.fromkeys(present, Issued(now, state.sequence, state.round - 1)))
    state = state.recounted(phase=Phase.EVALUATING, opened_at=now, began_at=now, asked=asked)
    state = state.but(due_at=-math.inf)
    if state.evaluate_pending and present:
        state = work(state, present, now, out)
    return _try_to_finish(state, now, out)


def _try_to_finish(state: State, now: float, out: Effects) -> State:
    if state.evaluate_pending:
        listening = state.gate_until < math.inf  # resumed: who is there is yet to be heard
        waited = now >= state.opened_at + state.rules.deadline_s
        if not waited and (listening or state.tally.unevaluated):
            return state
        state = _record_evaluation(state, out, whole=False)
    reason = state.enough or f"{state.round - 1} rounds are done"
    return _end(state, "finished", reason, out)


def _end(state: State, outcome: Outcome, reason: str, out: Effects) -> State:
    out.append(End(outcome, reason, tuple(sorted(state.met))))
    return state.but(phase=Phase.ENDED, outcome=outcome, reason=reason)


def _last(failed: Mapping[str, str]) -> str:
    worker, reason = max(failed.items())
    return f"{worker}: {reason}"
