"""What follows from a run's state, whatever event led to it: opening, closing, ending.

The second half of the round machine (``rounds``), as pure as the first: ``progress(state, now,
out)`` is called after every event, returns the next state and adds what is to be done to ``out``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from hashlib import sha256

from fluffle_coordinator.effects import (
    AskInit,
    Commit,
    Effect,
    End,
    Opened,
    RecordEvaluation,
    SendEvaluate,
    SendFit,
    Tell,
)
from fluffle_coordinator.run_state import Outcome, Phase, State

Effects = list[Effect]

# How many rounds may be averaged and not yet on disk while the next is open: the disk may take as
# long as two rounds, and what a crash takes back is no more than that.
AHEAD = 2


def progress(state: State, now: float, out: Effects) -> State:
    """Take the steps that the state and the time allow; none where there is no link."""
    if not state.link:
        return state
    if now >= state.gate_until:
        state = state.but(gate=1, gate_until=math.inf)
    match state.phase:
        case Phase.WAITING:
            past_the_last = state.round > state.rules.rounds
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
    """Return when a ``Tick`` is due at the latest; infinity where nothing waits for time."""
    rules = state.rules
    if not state.link or state.phase is Phase.ENDED:
        return math.inf
    times = [worker.deadline(rules) for worker in state.workers.values()]
    times.append(state.gate_until)
    if state.quorum_at is not None:
        if state.phase is Phase.OPEN and len(state.saving) < AHEAD:
            times.append(state.quorum_at + rules.grace_s)
    elif state.saving:
        pass  # nothing ends before what is averaged is on disk
    elif state.phase is Phase.WAITING:
        times.append(state.waiting_since + rules.wait_s)
    elif state.phase in (Phase.OPEN, Phase.EVALUATING):
        times.append(state.opened_at + rules.deadline_s)
    return min(times)


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


def work(state: State, workers: tuple[str, ...]) -> Effect:
    """Return the effect that sends the work of the moment to these workers."""
    if state.phase is Phase.EVALUATING:
        return SendEvaluate(workers)
    return SendFit(workers, evaluate=state.evaluate_pending)


def tell_of_round(state: State, tell: Tell, out: Effects) -> State:
    """Let people know of the open round: after the commit of the one before, in any case."""
    if not state.saving:
        out.append(tell)
        return state
    *before, last = state.saving
    return state.but(saving=(*before, last.then(tell)))


# --- before a round ----------------------------------------------------------------------------


def _try_to_open(state: State, now: float, out: Effects) -> State:
    present = sorted(state.workers)
    if state.has_weights and len(present) >= state.gate:
        return _open(state, present, now, out)
    if state.saving:
        return state
    if now >= state.waiting_since + state.rules.wait_s:
        told = (
            "no first weights came"
            if len(present) >= state.gate
            else f"{len(present)} of {state.gate} workers came"
        )
        return _end(state, "stopped", f"{told} in {state.rules.wait_s:.0f} s", out)
    return state if state.has_weights else _try_to_init(state, present, out)


def _try_to_init(state: State, present: list[str], out: Effects) -> State:
    if state.init_asked is not None:
        return state
    able = [name for name in present if name not in state.failed]
    if able:
        out += [AskInit(able[0]), Tell("init", {"worker": able[0]})]
        return state.but(init_asked=able[0])
    if present and len(present) >= state.gate:
        return _end(state, "stopped", f"no first weights: {_last(state.failed)}", out)
    return state


def _open(state: State, present: list[str], now: float, out: Effects) -> State:
    chosen = select(present, state.rules.fraction, state.rules.seed, state.round)
    # Updates that were confirmed to an earlier coordinator may be here already.
    asked = dict.fromkeys(chosen, now) | dict.fromkeys(state.received, -math.inf)
    state = state.but(
        phase=Phase.OPEN,
        opened_at=now,
        asked=asked,
        failed={},
        doubted={},
        gate=1,
        gate_until=math.inf,
    )
    told = {
        "round": state.round,
        "asked": sorted(asked),
        "needed": state.needed,
        "deadline_s": state.rules.deadline_s,
    }
    out.append(Opened())
    waiting = tuple(name for name in chosen if name not in state.received)
    if waiting:
        out.append(work(state, waiting))
    return _try_to_commit(tell_of_round(state, Tell("opened", told), out), now, out)


# --- an open round -----------------------------------------------------------------------------


def _try_to_commit(state: State, now: float, out: Effects) -> State:
    if len(state.saving) >= AHEAD:
        return state
    if state.quorum_at is None and state.folded >= state.needed:
        state = state.but(quorum_at=now)
    if state.quorum_at is not None:  # whoever is asked from now on does not undo the quorum
        everyone = all(w in state.received and state.received[w].folded for w in state.expected)
        if everyone or now >= state.quorum_at + state.rules.grace_s:
            return _commit(state, out)
        return state
    if state.saving:
        return state
    if state.asked and not state.received and state.asked.keys() <= state.failed.keys():
        told = f"every worker failed in round {state.round}; {_last(state.failed)}"
        return _end(state, "stopped", told, out)
    if now >= state.opened_at + state.rules.deadline_s:
        return _at_the_deadline(state, now, out)
    return state


def _commit(state: State, out: Effects) -> State:
    state = _record_evaluation(state, out, whole=False)
    out.append(Commit(state.round))
    return state.but(phase=Phase.COMMITTING)


def _at_the_deadline(state: State, now: float, out: Effects) -> State:
    rules = state.rules
    missing = f"missing: {', '.join(state.missing)}" if state.missing else "nobody else is here"
    told = (
        f"round {state.round} has {state.folded} of {state.needed} updates "
        f"after {rules.deadline_s:.0f} s, {missing}"
    )
    if rules.on_deadline == "stop":
        return _end(state, "stopped", told, out)
    if rules.on_deadline == "close" and state.folded >= rules.min_updates:
        out.append(Tell("closed", {"round": state.round, "reason": told}))
        return _commit(state, out)
    stuck = state.reopenings + 1 if state.folded == state.reopened_with else 1
    if stuck > rules.max_reopenings:
        return _end(state, "stopped", f"{told}; reopened {rules.max_reopenings} times", out)
    return _reopen(state.but(reopenings=stuck, reopened_with=state.folded), told, now, out)


def _reopen(state: State, reason: str, now: float, out: Effects) -> State:
    rules = state.rules
    chosen = select(state.workers, rules.fraction, rules.seed, state.round)
    asked = dict.fromkeys(state.received, -math.inf) | dict.fromkeys(chosen, now)
    # Whoever has been receiving for all this time will not get the rest any more.
    lacking = tuple(
        name
        for name in chosen
        if name not in state.received
        and (not state.busy(name) or state.workers[name].state == "receiving")
    )
    state = state.but(opened_at=now, asked=asked, failed={}, doubted={})
    told = {"round": state.round, "asked": sorted(asked), "needed": state.needed}
    out.append(Tell("reopened", {**told, "deadline_s": rules.deadline_s, "reason": reason}))
    if lacking:
        out.append(work(state, lacking))
    return state


# --- evaluations, and the end ------------------------------------------------------------------


def _record_evaluation(state: State, out: Effects, *, whole: bool = True) -> State:
    """Write the evaluation of the last committed model, once all have sent theirs (``whole``)."""
    if not state.evaluate_pending or not state.evaluations:
        return state
    # A worker's evaluation comes before its update, if it has one at all.
    heard = state.evaluations.keys() | state.received.keys()
    if whole and not (state.expected and state.expected <= heard):
        return state
    out.append(RecordEvaluation(state.round - 1, state.evaluations))
    return state.but(evaluate_pending=False)


def _evaluate_only(state: State, now: float, out: Effects) -> State:
    """All rounds are done: ask for the evaluation of the last model, where it is wanted."""
    present = sorted(state.workers)
    state = state.but(phase=Phase.EVALUATING, opened_at=now, asked=dict.fromkeys(present, now))
    if state.evaluate_pending and present:
        out.append(work(state, tuple(present)))
    return _try_to_finish(state, now, out)


def _try_to_finish(state: State, now: float, out: Effects) -> State:
    if state.evaluate_pending:
        listening = state.gate_until < math.inf  # resumed: who is there is yet to be heard
        waited = now >= state.opened_at + state.rules.deadline_s
        if not waited and (listening or not state.expected <= state.evaluations.keys()):
            return state
        state = _record_evaluation(state, out, whole=False)
    return _end(state, "finished", f"{state.round - 1} rounds are done", out)


def _end(state: State, outcome: Outcome, reason: str, out: Effects) -> State:
    out.append(End(outcome, reason, tuple(sorted(state.met))))
    return state.but(phase=Phase.ENDED, outcome=outcome, reason=reason)


def _last(failed: Mapping[str, str]) -> str:
    worker, reason = list(failed.items())[-1]
    return f"{worker}: {reason}"
