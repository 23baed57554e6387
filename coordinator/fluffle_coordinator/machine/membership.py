"""Which workers take part: those that join, leave, fail, stall, are gone, or are refused."""

from __future__ import annotations

import math
from dataclasses import replace

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.agreement import other_frozen, refuse, unfit
from fluffle_coordinator.machine.clock import clock_time, first_due, schedule_check, stall_times
from fluffle_coordinator.machine.effects import Effects, Welcome
from fluffle_coordinator.machine.events import Failed, Left, Seen, Tick
from fluffle_coordinator.machine.records import Worker
from fluffle_coordinator.machine.state import Issued, Phase, State
from fluffle_coordinator.machine.work import assign_work, issue, resend_work, send_work


def seen(state: State, event: Seen, out: Effects) -> State:
    """Take in a hello or a heartbeat: the worker joins, or its state is updated."""
    worker = event.worker
    if worker.num_examples > state.announced.get(worker.name, 0):
        # The maximum: a forged hello must not make a worker's updates weigh less.
        state = state.replace(announced=state.announced.insert(worker.name, worker.num_examples))
    hearing_s = state.rules.patience * worker.heartbeat_s / 2
    if hearing_s < state.hearing_s < math.inf:
        state = state.replace(hearing_s=hearing_s)
    if not state.caught_up:
        return _greet(state, worker.name, out)
    if misfit := unfit(state, worker):
        return refuse(state, worker, misfit, out, again=event.hello)
    if worker.run == state.run and worker.round > state.round and not state.outdated:
        state, number = state.replace(outdated=True), state.round - 1
        out.append(run_events.Outdated(worker=worker.name, ahead=worker.round, round=number))
    known = state.workers.get(worker.name)
    restarted = known is None or known.session != worker.session
    if known is None or restarted:
        worker = replace(worker, joined_at=event.now, moved_at=event.now)
        state = state.replace(refused=state.refused.discard(worker.name))
        out.append(run_events.Joined(worker=worker.name, num_examples=worker.num_examples))
        if differs := other_frozen(state, worker):
            out.append(differs)
    else:
        moved = known.position != worker.position
        receives = worker.incomplete_bytes not in (None, known.incomplete_bytes)
        worker = replace(
            worker,
            joined_at=known.joined_at,
            moved_at=event.now if moved else known.moved_at,
            received_at=event.now if receives else known.received_at,
            stalled=known.stalled and not moved,
            failed_round=known.failed_round,
        )
    failed = state.failed
    if restarted or event.hello:
        out.append(Welcome(worker.name))
        failed = failed.discard(worker.name)
        if state.init_asked == worker.name:  # a process that has just started purged its inbox
            state = state.replace(init_asked=None)
    if event.hello:  # frozen tensors on their way are lost, unless the worker lists them
        state = state.replace(frozen_sent=state.frozen_sent.discard(worker.session))
    state = state.replace_for(
        worker.name,
        workers=state.workers.insert(worker.name, worker),
        failed=failed,
    )
    state = schedule_check(settle_doubt(state, worker.name), worker.name)
    return _offer(state, worker, event, restarted or event.hello, out)


def _greet(state: State, name: str, out: Effects) -> State:
    """Welcome a worker whose heartbeat may be old; if it is alive, it answers at once."""
    if name in state.greeted or name in state.workers:
        return state
    out.append(Welcome(name))
    return state.replace(greeted=state.greeted.insert(name, None))


def _offer(state: State, worker: Worker, event: Seen, fresh: bool, out: Effects) -> State:
    """Send the open work to a worker that lacks it: a new one, or one that lost its work."""
    name, issued = worker.name, state.asked.get(worker.name)
    if state.phase not in (Phase.OPEN, Phase.EVALUATING) or name in state.failed:
        return state
    evaluating = state.phase is Phase.EVALUATING
    if evaluating and not state.evaluate_pending:
        return state  # the run ends as soon as all its workers were heard
    if name in state.evaluations if evaluating else state.answer(name) is not None:
        return state
    # A model that is still being received lost its remaining parts with a link, at either end.
    patience_s, sent_at = state.rules.resend_s, 0.0
    if issued is not None:
        patience_s, sent_at = issued.patience_s(patience_s), issued.at
    lost = fresh or sent_at == -math.inf
    broken_off = worker.state == "receiving" and (
        event.hello
        or sent_at == -math.inf
        or event.now - max(worker.moved_at, worker.received_at, sent_at) >= patience_s
    )
    at_work = state.busy(name) and not broken_off
    if issued is None:
        return _include(state, worker, at_work, event.now, out)
    # Its work is, or is queued behind, what it is receiving.
    if at_work or (state.receives(name, event.now) and not lost):
        return state
    if state.done(name):
        patience_s *= 4  # its update may be on its way
    if lost or broken_off or event.now - sent_at >= patience_s:
        return resend_work(state, name, event.now, out, repeat=not lost)
    return state


def _include(state: State, worker: Worker, at_work: bool, now: float, out: Effects) -> State:
    """Include a worker that was not asked: it joins late, or an earlier coordinator asked it."""
    name = worker.name
    if state.phase is Phase.EVALUATING:
        issued = Issued(now, state.sequence, state.round - 1)
        state = issue(state, name, issued)
        return state if at_work else send_work(state, (name,), now, out)
    chosen = state.schedule.idle(state, name)
    earlier = state.issued_before(worker, now) if at_work else None
    if earlier and (state.schedule.continuous or name in chosen):
        return issue(state, name, earlier)
    return assign_work(state, chosen, now, out)


def settle_doubt(state: State, worker: str) -> State:
    """Mark a worker as failed if an unsound update came in its name and it reports it as sent.

    While the worker is still at work, that update was forged, and its own is still to come. So it
    is if the worker was asked for another attempt, and has not been heard since.
    """
    reason, issued = state.doubted.get(worker), state.asked.get(worker)
    if reason is None or not state.done(worker):
        return state
    again = state.attempts.get(worker, 0) > 1
    if again and issued is not None and state.workers[worker].last_seen <= issued.at:
        return state
    return state.replace_for(
        worker,
        failed=state.failed.insert(worker, reason),
        doubted=state.doubted.discard(worker),
    )


def left(state: State, event: Left, out: Effects) -> State:
    """Remove a worker that said goodbye, unless an earlier process of it did."""
    known = state.workers.get(event.worker)
    if known is None or known.session != event.session:
        return state
    out.append(run_events.Left(worker=event.worker, reason=event.reason))
    return state.without(event.worker)


def failed(state: State, event: Failed, out: Effects) -> State:
    """Mark a worker as failed if the failed work is what it was asked for.

    Any other failure, such as one after a stall, is only reported, and once a round: otherwise, one
    worker could fill the log and the journal. Those of unknown workers are ignored.
    """
    name, issued = event.worker, state.asked.get(event.worker)
    known = state.workers.get(name)
    failure = run_events.Failure(worker=name, round=event.round, reason=event.reason)
    if event.run != state.run:
        return state
    if name == state.init_asked and event.round == 0:
        state = state.replace(init_asked=None)
    elif issued is None or event.round != issued.round or name in state.failed:
        if known is not None and known.failed_round < event.round <= state.round:
            out.append(failure)
            reported = replace(known, failed_round=event.round)
            state = state.replace(workers=state.workers.insert(name, reported))
        return state
    out.append(failure)
    return state.replace_for(event.worker, failed=state.failed.insert(event.worker, event.reason))


def tick(state: State, event: Tick, out: Effects) -> State:
    """Remove the workers that are gone, and report those that have stalled."""
    if not state.link:
        return state
    now = clock_time(state, event.now)
    if now < state.due_at:
        return state
    gone = [w for w in state.workers.values() if w.deadline(state.rules) <= now]
    for worker in sorted(gone, key=lambda worker: worker.name):
        silent_s = round(now - worker.last_seen, 1)
        out.append(run_events.Gone(worker=worker.name, silent_s=silent_s))
        state = state.without(worker.name)
    for worker in list(state.workers.values()):
        state = _check_for_stall(state, worker, now, out)
    return state.replace(due_at=first_due(state))


def _check_for_stall(state: State, worker: Worker, now: float, out: Effects) -> State:
    if all(now < at for at in stall_times(state, worker)):
        return state
    still_s, name = now - worker.moved_at, worker.name
    # The sums are those of ``stall_times``: a difference may be rounded to less than the limit.
    if not worker.stalled and now >= worker.moved_at + worker.stall_s(state.rules):
        stalled = run_events.Stalled(
            worker=name,
            round=worker.round,
            state=worker.state,
            step=worker.step if worker.has_steps else None,
            steps=worker.steps if worker.has_steps else None,
            still_s=round(still_s, 1),
        )
        out.append(stalled)
        state = state.replace(workers=state.workers.insert(name, replace(worker, stalled=True)))
    limit_s = state.rules.stall_timeout_s
    if limit_s is None or now < worker.moved_at + limit_s or not state.busy(name):
        return state
    where = f"at step {worker.step} of {worker.steps}" if worker.has_steps else worker.state
    reason = f"no progress for {still_s:.0f} s, {where} (--stall-timeout)"
    out.append(run_events.Failure(worker=name, round=worker.round, reason=reason))
    return state.replace_for(name, failed=state.failed.insert(name, reason))
