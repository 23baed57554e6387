"""The life of an update: accepted, folded and committed; or late, a duplicate, or rejected.

A delivery stays unacknowledged until the round that counts its update is on disk. Until then,
``State.received`` holds it, and further copies as ``spares``: each may be the only sound one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from rpds import List

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.effects import Ack, Effects, Fold, Forget, Judge, Reject
from fluffle_coordinator.machine.evaluation import record_evaluation
from fluffle_coordinator.machine.events import Arrived, Committed, Folded, FoldFailed
from fluffle_coordinator.machine.membership import settle_doubt
from fluffle_coordinator.machine.norms import max_norm
from fluffle_coordinator.machine.records import Ticket
from fluffle_coordinator.machine.state import SEQUENCE_GAP, Issued, Phase, State, Table, Tally
from fluffle_coordinator.machine.work import assign_work, resend_work

_T = TypeVar("_T")
# For so many rounds, a copy of a counted update is recognised as such, not taken for a late one.
_ROUNDS_REMEMBERED = 3

# Why an update is rejected that was sound for an earlier coordinator with other settings, such as
# another ``--train``. Its worker has not failed, and is asked again.
_CAUSES_OF_SETTINGS = ("tensors", "malformed")


def arrived(state: State, event: Arrived, out: Effects) -> State:
    """Accept an update and fold it, hold it as a copy, or say why it does not count."""
    handle, number = event.handle, event.round
    if event.run != state.run:
        reason = f"the message belongs to run {event.run}, but this coordinator runs {state.run}"
        out.append(Reject(handle, reason, "run"))
        return state
    update = _with_ticket(state, event)
    ticket = update.ticket
    if state.has_counted(ticket, number):
        out += [Ack(handle), run_events.Duplicate(worker=ticket.worker, round=number)]
        return state
    if number < state.round and not (
        _accepts_updates(state) and _discount(state, state.round - number)
    ):
        out += [Ack(handle), *_late(update)]
        return _finish_work(state, ticket, event.now, out)
    if number > state.round or not _accepts_updates(state):
        return _reject(state, event, f"round {number} has not been opened", out)
    base = state.base_of(number)
    if event.base != base:
        trained = f"the update was trained from the weights {event.base}"
        return _reject(state, event, f"{trained}; round {number} began with {base}", out)
    if ticket.sequence > max(state.sequence, number) + SEQUENCE_GAP:
        reason = f"the ticket {ticket.sequence} was not issued to {ticket.worker}"
        return _reject(state, event, reason, out)
    if state.schedule.continuous:  # an earlier coordinator may have issued higher ones
        state = state.replace(sequence=max(state.sequence, ticket.sequence))
    if ticket in state.received:
        return _hold_copy(state, update, out)
    update = _weighed(state, update, out)
    if state.phase is not Phase.COMMITTING:  # else ``committed`` decides what becomes of it
        out.append(_fold(state, update))
    return _hold(state, update)


def _with_ticket(state: State, update: Arrived) -> Arrived:
    """Return an update with its round's ticket, if each worker is asked once a round."""
    worker, sequence = update.ticket
    if state.schedule.continuous or sequence == update.round:
        return update
    return replace(update, ticket=Ticket(worker, update.round))


def _hold(state: State, update: Arrived) -> State:
    received = state.received.insert(update.ticket, update)
    return state.replace_for(update.ticket.worker, received=received)


def _accepts_updates(state: State) -> bool:
    """Whether updates can be folded: there are weights, and a round is open or still to come."""
    return state.has_weights and state.phase is not Phase.EVALUATING


def _discount(state: State, staleness: int) -> float:
    """Return the factor on the weight of an update that is so many versions old."""
    schedule = state.schedule
    if staleness > schedule.max_staleness:
        return 0.0
    return schedule.discount(staleness) if staleness or schedule.continuous else 1.0


def _fold(state: State, update: Arrived) -> Fold:
    staleness = state.round - update.round
    return Fold(update, max_norm(state), staleness, _discount(state, staleness))


def _reject(state: State, update: Arrived, reason: str, out: Effects) -> State:
    """Reject an update from a round or from weights that this run does not have."""
    out += [Reject(update.handle, reason, "round"), Judge(update, "rejected", reason, "round")]
    return state


def _weighed(state: State, update: Arrived, out: Effects) -> Arrived:
    """Return an update that weighs no more than its worker announced."""
    claimed, worker = update.num_examples, update.ticket.worker
    limit = state.announced.get(worker)
    if limit is None:  # it left before this coordinator heard it
        limit = max(state.announced.values(), default=claimed)
    if state.rules.max_examples is not None:
        limit = min(limit, state.rules.max_examples)
    if claimed <= limit:
        return update
    overweight = run_events.Overweight(
        worker=worker, round=update.round, num_examples=claimed, limit=limit
    )
    out.append(overweight)
    return replace(update, num_examples=limit)


def _finish_work(state: State, ticket: Ticket, now: float, out: Effects) -> State:
    """Mark a worker's work as done and offer new work, if work outlives its round."""
    issued = state.asked.get(ticket.worker)
    if not state.schedule.continuous or issued is None:
        return state
    sends_tickets = issued.sequence == ticket.sequence
    if not sends_tickets and issued.round != ticket.sequence:
        return state
    state = state.replace_for(ticket.worker, asked=state.asked.discard(ticket.worker))
    # Without tickets, two updates of one round could not be told apart, so there is only one.
    if not sends_tickets or state.phase is not Phase.OPEN or not state.link:
        return state
    if state.folded >= state.needed:  # newer weights follow in a moment
        return state
    return assign_work(state, state.schedule.idle(state, ticket.worker), now, out)


def _late(update: Arrived) -> Effects:
    worker, number = update.ticket.worker, update.round
    late = run_events.Late(worker=worker, round=number, num_examples=update.num_examples)
    return [late, Judge(update, "late", f"round {number} was committed without this update")]


def _hold_copy(state: State, copy: Arrived, out: Effects) -> State:
    """Hold a copy of an update that is here already, so that it is neither folded twice nor lost.

    A copy is not needed while the delivery that was folded is still valid. If that one is void, the
    copy is acknowledged in its place. If none is folded yet, any copy may be the only sound one.
    """
    ticket, held = copy.ticket, state.received[copy.ticket]
    if ticket in state.norms and held.handle.link == copy.handle.link:
        out.append(Ack(copy.handle))
        return state
    if ticket in state.norms:
        out.append(Forget(copy.handle))
    copies = state.spares.get(ticket, List()).push_front(copy)
    return state.replace(spares=state.spares.insert(ticket, copies))


def folded(state: State, event: Folded, out: Effects) -> State:
    """Count an update that is in the sum."""
    ticket, update = event.ticket, state.received[event.ticket]
    worker = ticket.worker
    if spares := state.spares.get(ticket):
        void = update.handle.link != state.link  # then the spares are acknowledged in its place
        out.extend((Forget if void else Ack)(spare.handle) for spare in spares)
    staleness = state.round - update.round
    asked, fresh = state.asked, not staleness
    if fresh and worker not in asked and not state.schedule.continuous:
        asked = asked.insert(worker, Issued(-math.inf, ticket.sequence, state.round))
    towards_quorum = state.schedule.continuous or fresh
    state = state.replace_for(
        worker,
        norms=state.norms.insert(ticket, event.norm),
        folded=state.folded + towards_quorum,
        asked=asked,
        train_s=state.train_s.insert(worker, update.train_s) if state.selects else state.train_s,
        failed=state.failed.discard(worker),
        doubted=state.doubted.discard(worker),
        due_at=-math.inf if worker in state.failed else state.due_at,
    )
    counted = run_events.Counted(
        worker=worker,
        round=state.round,
        num_examples=update.num_examples,
        updates=state.folded,
        needed=state.needed,
        train_s=update.train_s,
        bytes=update.size_bytes,
        staleness=staleness or None,
        weight=update.num_examples * _discount(state, staleness) if staleness else None,
    )
    out.append(counted)
    return _finish_work(state, ticket, event.now, out)


def fold_failed(state: State, event: FoldFailed, out: Effects) -> State:
    """Fold the next copy after a failure; without one, reject the update or request it again."""
    ticket, failed = event.ticket, state.received[event.ticket]
    worker = ticket.worker
    if event.again:
        out += [Ack(failed.handle), run_events.Resend(worker=worker, reason=event.reason)]
    else:
        out.append(Reject(failed.handle, event.reason, event.cause))
    if copies := state.spares.get(ticket):
        update = _weighed(state, next(iter(copies)), out)
        if state.phase is not Phase.COMMITTING:  # else it would be in the next round's sum
            out.append(_fold(state, update))
        return _hold(state, update).replace(spares=state.spares.insert(ticket, copies.drop_first()))
    was_asked = state.answer(worker) is failed
    state = state.replace_for(
        worker, received=state.received.discard(ticket), spares=state.spares.discard(ticket)
    )
    if not event.again:  # the worker would send the same bytes again, if they are its own at all
        out.append(Judge(failed, "rejected", event.reason, event.cause))
        earlier = state.attempts.get(worker, 0)
        # A later request is another attempt, which the same bytes do not answer.
        state = state.replace(attempts=state.attempts.insert(worker, earlier + 1))
        if earlier or failed.round > state.resumed_at or event.cause not in _CAUSES_OF_SETTINGS:
            state = state.replace(doubted=state.doubted.insert(worker, event.reason))
            return settle_doubt(state, worker)
    if was_asked and worker in state.workers and state.phase is Phase.OPEN:
        issued = state.asked[worker]
        again = event.again and issued.repeats
        patience_s = issued.patience_s(state.rules.resend_s) if again else 0.0
        # Whoever announces parts that never come must not be sent the model every time.
        if event.now - issued.at >= patience_s:
            return resend_work(state, worker, event.now, out, repeat=event.again)
    return state


def committed(state: State, event: Committed, out: Effects) -> State:
    """Acknowledge the updates of a round that is on disk, and begin the next round."""
    counted = frozenset(state.norms)
    carried: list[Arrived] = []
    late: list[Arrived] = []
    last = event.round >= state.rules.rounds or bool(event.enough)
    for ticket, update in state.received.items():
        if ticket not in counted:
            later = not last and _discount(state, state.round + 1 - update.round)
            (carried if later else late).append(update)
    done = [*(state.received[ticket] for ticket in counted), *late]
    copies = (copy for update in done for copy in state.spares.get(update.ticket, ()))
    out += map(Ack, sorted(copy.handle for copy in (*done, *copies)))
    for update in sorted(late, key=lambda update: update.ticket):
        out += _late(update)
    report = run_events.Committed(
        round=event.round,
        participants=tuple(sorted({ticket.worker for ticket in counted})),
        num_examples=event.num_examples,
        timings=event.timings,
    )
    out.append(report)
    for update in late:
        state = _finish_work(state, update.ticket, event.now, out)
    state = record_evaluation(state, out, partial=True)  # what came during the commit
    state = _next_round(state, event, counted, carried)
    by_arrival = sorted(carried, key=lambda update: update.handle)
    out += [_fold(state, update) for update in by_arrival]
    return state


def _unevaluated(state: State) -> frozenset[int]:
    """Return the versions without an evaluation that a worker may still evaluate."""
    known = {number - 1 for number in state.earlier}
    pending = {state.round - 1} if state.evaluate_pending else set()
    return frozenset((state.unevaluated & known) | pending)


def _next_round(
    state: State, event: Committed, counted: frozenset[Ticket], carried: Iterable[Arrived]
) -> State:
    before = {**state.counted_before, event.round: counted}
    received: Table[Ticket, Arrived] = Table({update.ticket: update for update in carried})
    spares = {ticket: copies for ticket, copies in state.spares.items() if ticket in received}
    state = remember(state, before, {**state.earlier, event.round: state.base}).replace(
        phase=Phase.WAITING,
        round=event.round + 1,
        base=event.base,
        enough=event.enough,
        unevaluated=_unevaluated(state),
        evaluate_pending=True,
        evaluations=Table(),
        received=received,
        norms=Table(),
        spares=Table(spares),
        folded=0,
        asked_before=frozenset(),
        attempts=Table(),
        quorum_at=None,
        reopenings=0,
        reopened_with=0,
        gate=1,
        waiting_since=event.now,
    )
    if state.schedule.continuous:  # workers continue with their work
        return state.replace_and_recount()
    return state.replace(asked=Table(), failed=Table(), doubted=Table(), tally=Tally())


def remember(
    state: State, counted: Mapping[int, frozenset[Ticket]], bases: Mapping[int, str]
) -> State:
    """Note which updates the last rounds counted, and the weights of those that still count.

    A copy of an older update is late in any case.
    """
    staleness = state.schedule.max_staleness
    return state.replace(
        counted_before=_newest(counted, max(_ROUNDS_REMEMBERED, staleness + 1)),
        earlier=_newest(bases, staleness),
    )


def _newest(of_rounds: Mapping[int, _T], count: int) -> Mapping[int, _T]:
    oldest = max(of_rounds, default=0) - count
    return {number: one for number, one in of_rounds.items() if number > oldest}
