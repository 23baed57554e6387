"""The closing of a round: at its quorum, at its deadline, or by the end of the run.

A round has its quorum once ``State.folded`` reaches ``State.needed``; the schedule says how many
updates are needed, and when, from then on, the round closes (``Schedule.closes``). A quorum stands:
workers that are asked afterwards do not undo it. A schedule that does not close the round is
overruled after ``Rules.deadline_s``.
"""

from __future__ import annotations

import math

from fluffle_common.plural import listed
from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.effects import Commit, Effects
from fluffle_coordinator.machine.evaluation import record_evaluation
from fluffle_coordinator.machine.events import Event, Left
from fluffle_coordinator.machine.finishing import end, last_failure
from fluffle_coordinator.machine.norms import report_outliers
from fluffle_coordinator.machine.opening import reopen
from fluffle_coordinator.machine.state import Phase, State


def try_to_close(state: State, now: float, out: Effects) -> State:
    """Commit the open round at its quorum; at its deadline, reopen it, commit it or stop."""
    if state.quorum_at is None and state.folded >= state.needed:
        state = state.replace(quorum_at=now)
    if state.quorum_at is not None:
        return _close_after_quorum(state, now, out)
    if _all_failed(state):
        return _after_failures(state, now, out)
    return _at_the_deadline(state, now, out) if now >= due_at(state) else state


def due_at(state: State) -> float:
    """Return when the open round is closed, reopened or stopped if nothing else happens.

    This is its deadline, which waits for updates that are being folded. From the quorum on, the
    deadline begins anew, and the schedule may ask for more time (``Schedule.wakeup``). No round
    stays open longer than ``Rules.max_round_s``.
    """
    rules = state.rules
    latest = state.began_at + rules.max_round_s
    if state.quorum_at is not None:
        planned = state.schedule.wakeup(state)
        deadline = state.quorum_at + rules.deadline_s
        return min(latest, deadline if math.isinf(planned) else max(deadline, planned))
    return latest if _is_folding(state) else deadline_at(state)


def deadline_at(state: State) -> float:
    """Return the deadline of a round without a quorum."""
    rules = state.rules
    return min(state.opened_at + rules.deadline_s, state.began_at + rules.max_round_s)


def _is_folding(state: State) -> bool:
    """Whether an update is here that is not in the sum yet."""
    return len(state.norms) < len(state.received)


def _expired(state: State, now: float) -> bool:
    return now >= state.began_at + state.rules.max_round_s


def _close_after_quorum(state: State, now: float, out: Effects) -> State:
    """Commit the round when its schedule says so, or when that has taken too long."""
    assert state.quorum_at is not None
    if not state.schedule.closes(state, now):
        if now < due_at(state):
            return state
        option = "--max-round" if _expired(state, now) else "--deadline"
        reason = (
            f"round {state.round} has its quorum, but the schedule did not close the round within "
            f"{now - state.quorum_at:.0f} s ({option})"
        )
        out.append(run_events.Closed(round=state.round, reason=reason))
    return _commit(state, out)


def _all_failed(state: State) -> bool:
    # The sizes are compared first, since the names are looked up one by one.
    updates = state.folded or _is_folding(state)  # discounted late ones do not answer
    if updates or not 0 < len(state.asked) <= len(state.failed):
        return False
    # If work outlives its round, an idle worker gets the place of one that failed.
    others = state.workers if state.schedule.continuous else ()
    return all(name in state.failed for name in (*state.asked, *others))


def _after_failures(state: State, now: float, out: Effects) -> State:
    """Ask others at once if all that were asked have failed; stop if there are none."""
    rules, reopened = state.rules, state.reopenings + 1
    # A Poisson sample remains the same.
    others = rules.secret is None and any(name not in state.asked for name in state.workers)
    if not others or rules.on_deadline == "stop" or reopened > rules.max_reopenings:
        reason = f"every worker failed in round {state.round}; {last_failure(state.failed)}"
        return end(state, "stopped", reason, out)
    reason = f"all workers asked in round {state.round} have failed; {last_failure(state.failed)}"
    state = state.replace(reopenings=reopened, reopened_with=state.folded)
    return reopen(state, reason, now, out)


def _commit(state: State, out: Effects) -> State:
    state = record_evaluation(state, out, partial=True)
    state = report_outliers(state, out)
    in_it = {ticket.worker for ticket in state.received}
    out.append(Commit(state.round, tuple(sorted({*state.asked, *state.asked_before, *in_it}))))
    return state.replace(phase=Phase.COMMITTING)


def _at_the_deadline(state: State, now: float, out: Effects) -> State:
    rules = state.rules
    reason = _progress_after(state, now - state.opened_at)
    if rules.on_deadline == "stop":
        return end(state, "stopped", reason, out)
    if rules.on_deadline == "close" and state.folded >= rules.min_updates:
        out.append(run_events.Closed(round=state.round, reason=reason))
        return _commit(state, out)
    if _expired(state, now):
        reason = _progress_after(state, rules.max_round_s)
        return end(state, "stopped", f"{reason}; the round reached the limit --max-round", out)
    if any(state.advancing(name) for name in state.missing):
        fruitless = 0  # a long round is not a dead one
    else:
        fruitless = state.reopenings + 1 if state.folded == state.reopened_with else 1
    if fruitless > rules.max_reopenings:
        times = "once" if rules.max_reopenings == 1 else f"{rules.max_reopenings} times"
        reason = f"{reason}; the round was reopened at its --deadline {times} without progress"
        return end(state, "stopped", reason, out)
    state = state.replace(reopenings=fruitless, reopened_with=state.folded)
    return reopen(state, reason, now, out)


def _progress_after(state: State, seconds: float) -> str:
    names = listed(state.missing)
    if names:
        missing = f"missing: {names}{_why_missing(state)}"
    elif _is_folding(state):
        missing = "other updates are still being added"
    else:
        missing = "no other worker is connected"
    return (
        f"round {state.round} has {state.folded} of {state.needed} updates "
        f"after {seconds:.0f} s, {missing}"
    )


def _why_missing(state: State) -> str:
    """Return the fault of one of the missing workers, if there is one."""
    failed = {name: state.failed[name] for name in state.missing if name in state.failed}
    if failed:
        return f"; {last_failure(failed)}"
    rejected = {name: state.doubted[name] for name in state.missing if name in state.doubted}
    if rejected:
        worker, reason = max(rejected.items())
        return f"; the update of {worker} was rejected: {reason}"
    return ""


def report_smaller_quorum(before: State, after: State, event: Event, out: Effects) -> None:
    """Report when an event makes the quorum of the open round smaller, and on whose account."""
    if after.tally.expected >= before.tally.expected or after.phase is not Phase.OPEN:
        return
    was, needed = before.needed, after.needed
    if needed < was:
        reason = _why_smaller(before, after, event)
        out.append(run_events.Quorum(round=after.round, needed=needed, was=was, reason=reason))


def _why_smaller(before: State, after: State, event: Event) -> str:
    gone = [n for n in before.asked if n in before.workers and n not in after.workers]
    if gone:
        are_gone = "is gone" if len(gone) == 1 else "are gone"
        return f"{listed(sorted(gone))} {'left' if isinstance(event, Left) else are_gone}"
    failed = [name for name in after.failed if name not in before.failed]
    return f"{listed(sorted(failed)) or 'a worker'} failed"
