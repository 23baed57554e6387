"""The end of a run, which waits for the evaluation of the last model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fluffle_common.plural import listed
from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.effects import Effects, End
from fluffle_coordinator.machine.evaluation import record_evaluation
from fluffle_coordinator.machine.records import Outcome
from fluffle_coordinator.machine.state import Issued, Phase, State, Table
from fluffle_coordinator.machine.work import send_work


def evaluate_last_model(state: State, now: float, out: Effects) -> State:
    """Ask all workers to evaluate the last model, unless it is evaluated already."""
    present = tuple(sorted(state.workers))
    asked = Table(dict.fromkeys(present, Issued(now, state.sequence, state.round - 1)))
    state = state.replace_and_recount(
        phase=Phase.EVALUATING,
        opened_at=now,
        began_at=now,
        due_at=-math.inf,
        asked=asked,
        failed=Table(),  # a failed training says nothing about this work
    )
    if state.evaluate_pending:
        state = send_work(state, present, now, out)
    elif state.unheard:  # the run was resumed, so that ``gate_until`` is set
        limit, names = f"{state.gate_until - now:.0f} s", listed(state.unheard)
        reason = f"the run is done; waiting up to {limit} to inform {names}"
        out.append(run_events.Waiting(reason=reason, what="workers"))
    return try_to_finish(state, now, out)


def try_to_finish(state: State, now: float, out: Effects) -> State:
    """Finish the run once the last model is evaluated, or at the deadline.

    After a restart, the run first waits for a sign of life from its workers, for a limited time
    (``State.gate_until``). One that is heard only after the end would wait for work for ever.
    """
    listening = state.gate_until < math.inf
    if state.evaluate_pending:
        expired = now >= state.opened_at + state.rules.deadline_s
        if not expired and (listening or state.tally.unevaluated):
            return state
        state = record_evaluation(state, out, partial=True)
    elif listening and state.unheard:
        return state
    done = state.round - 1
    rounds = "1 round is done" if done == 1 else f"{done} rounds are done"
    if state.rules.rounds_limit:
        rounds = f"{rounds}; {state.rules.rounds_limit}"
    return end(state, "finished", state.enough or rounds, out)


def end(state: State, outcome: Outcome, reason: str, out: Effects) -> State:
    """End the run; every worker that was ever in it is told, also if it was not heard lately."""
    out.append(End(outcome, reason, state.known))
    return state.replace(phase=Phase.ENDED, outcome=outcome, reason=reason)


def last_failure(failed: Mapping[str, str]) -> str:
    """Return one of the failures, with its worker: the last by name."""
    worker, reason = max(failed.items())
    return f"{worker}: {reason}"
