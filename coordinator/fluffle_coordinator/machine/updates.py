"""What becomes of an update: taken in, folded, counted with its round, late, a copy, or refused.

A part of the round machine (``machine``), as pure as the rest of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from fluffle_common.errors import Cause
from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.effects import Ack, Effects, Fold, Judge, Record, Reject
from fluffle_coordinator.machine.events import Arrived, Committed, Folded, FoldFailed
from fluffle_coordinator.machine.membership import settle_doubt
from fluffle_coordinator.machine.state import (
    TICKETS_LEFT_OUT,
    Issued,
    Phase,
    Received,
    State,
    Table,
    Tally,
    Ticket,
    remembered,
    still_matter,
)
from fluffle_coordinator.machine.work import give_work, send_again


def arrived(state: State, event: Arrived, out: Effects) -> State:
    """Take in that an update has come: fold it, hold it, or say why not."""
    handle, ticket = event.handle, _ticket(state, event)
    if event.run != state.run:
        reason = f"it belongs to run {event.run}; this coordinator runs {state.run}"
        out.append(Reject(handle, reason, "run"))
        return state
    if state.has_counted(ticket, event.round):
        out += [
            Ack(handle),
            Record(run_events.Duplicate(worker=ticket.worker, round=event.round)),
        ]
        return state
    if event.round < state.round and not (_takes(state) and _discount(state, event.round)):
        return _too_old(state, event, ticket, out)
    if event.round > state.round or not _takes(state):
        _reject(event, f"round {event.round} has not been opened", out)
        return state
    began_with = state.base_of(event.round)
    if event.base != began_with:
        trained = f"it was trained from the weights {event.base}; round {event.round} began with"
        _reject(event, f"{trained} {began_with}", out)
        return state
    if ticket.sequence > max(state.sequence, event.round) + TICKETS_LEFT_OUT:
        _reject(event, f"ticket {ticket.sequence} of {ticket.worker} was not issued", out)
        return state
    if state.schedule.continuous:  # an earlier coordinator may have issued more than this one yet
        state = state.but(sequence=max(state.sequence, ticket.sequence))
    held = state.received.get(ticket)
    if held is not None:
        return _again(state, ticket, held, event, out)
    update = Received(handle, _weight(state, event, out), event.round)
    if state.phase is not Phase.COMMITTING:  # else it is looked at once the commit is on disk
        out.append(_fold(state, ticket, update))
    return _with(state, ticket, update)


def _ticket(state: State, event: Arrived) -> Ticket:
    """Return an update's ticket; where each worker is asked once a round, that is the round's."""
    return event.ticket if state.schedule.continuous else Ticket(event.ticket.worker, event.round)


def _with(state: State, ticket: Ticket, update: Received) -> State:
    return state.of(ticket.worker, received=state.received.insert(ticket, update))


def _takes(state: State) -> bool:
    """Whether updates can be folded: there are weights, and the last round is yet to come."""
    return state.has_weights and state.phase is not Phase.EVALUATING


def _discount(state: State, number: int) -> float:
    """Return what part of its weight an update keeps that was trained from a round's weights."""
    staleness, schedule = state.round - number, state.schedule
    if staleness > schedule.max_staleness:
        return 0.0
    return schedule.discount(staleness) if staleness or schedule.continuous else 1.0


def _fold(state: State, ticket: Ticket, update: Received) -> Fold:
    staleness, discount = state.round - update.round, _discount(state, update.round)
    weight = update.num_examples
    return Fold(update.handle, ticket, weight, _max_norm(state), staleness, discount)


def _reject(event: Arrived, reason: str, out: Effects) -> None:
    """Refuse an update of a round, or from weights, that this run does not have."""
    out += [
        Reject(event.handle, reason, "round"),
        _judged(event.ticket, event.round, event.base, reason, "round"),
    ]


def _judged(ticket: Ticket, number: int, base: str, reason: str, cause: Cause) -> Judge:
    return Judge(ticket, number, base, "rejected", reason, cause, train_again=True)


def _weight(state: State, event: Arrived, out: Effects) -> int:
    """Return the weight of an update: what it says, within what its worker announced."""
    claimed, worker = event.num_examples, event.ticket.worker
    limit = state.announced.get(worker)
    if limit is None:  # it is gone, and we never heard it
        limit = max(state.announced.values(), default=claimed)
    if state.rules.max_examples is not None:
        limit = min(limit, state.rules.max_examples)
    if claimed > limit:
        overweight = run_events.Overweight(
            worker=worker, round=event.round, num_examples=claimed, limit=limit
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


def _too_old(state: State, event: Arrived, ticket: Ticket, out: Effects) -> State:
    """Let go of an update that counts no more; its worker gets other work."""
    out += [
        Ack(event.handle),
        _late(ticket.worker, event.round, event.num_examples),
        _too_late(ticket, event.round, event.base),
    ]
    return _without_work(state, ticket, event.now, out)


def _without_work(state: State, ticket: Ticket, now: float, out: Effects) -> State:
    """Note that a worker has done what it was asked for, where work does not end with its round."""
    issued = state.asked.get(ticket.worker)
    if not state.schedule.continuous or issued is None:
        return state
    brought_back = issued.sequence == ticket.sequence
    if not brought_back and issued.round != ticket.sequence:
        return state
    state = state.of(ticket.worker, asked=state.asked.discard(ticket.worker))
    # Who does not bring tickets back is asked once a round: its updates could not be told apart.
    if not brought_back or state.phase is not Phase.OPEN or not state.link:
        return state
    if state.folded >= state.needed:  # there will be newer weights in a moment
        return state
    return give_work(state, state.schedule.idle(state, ticket.worker), now, out)


def _too_late(ticket: Ticket, number: int, base: str) -> Judge:
    return Judge(ticket, number, base, "late", f"round {number} was committed without it")


def _late(worker: str, number: int, num_examples: int) -> Record:
    return Record(run_events.Late(worker=worker, round=number, num_examples=num_examples))


def _again(state: State, ticket: Ticket, held: Received, event: Arrived, out: Effects) -> State:
    """Take another copy of an update that we hold: never folded twice, never lost.

    Where we still hold the very delivery that was folded, a copy is not needed. Where that one is
    void, or not folded yet, we cannot know which copy is sound, and keep them all.
    """
    if held.folded and held.handle.link == event.handle.link:
        out.append(Ack(event.handle))
        return state
    return _with(state, ticket, held._replace(spares=(*held.spares, event.handle)))


def folded(state: State, event: Folded, out: Effects) -> State:
    """Take in that an update is in the sum."""
    ticket, held = event.ticket, state.received[event.ticket]
    worker, spares = ticket.worker, held.spares
    if spares and held.handle.link == state.link:
        out.extend(Ack(spare) for spare in spares)
        spares = ()
    update = held._replace(folded=True, spares=spares, norm=event.norm)
    staleness = state.round - held.round
    asked, open_and_fresh = state.asked, state.phase is Phase.OPEN and not staleness
    if open_and_fresh and worker not in asked and not state.schedule.continuous:
        asked = asked.insert(worker, Issued(-math.inf, ticket.sequence, state.round))
    closes_with_it = state.schedule.continuous or not staleness
    state = state.of(
        worker,
        received=state.received.insert(ticket, update),
        folded=state.folded + closes_with_it,
        asked=asked,
        train_s=state.train_s.insert(worker, event.train_s) if state.selects else state.train_s,
        failed=state.failed.discard(worker),
        doubted=state.doubted.discard(worker),
        due_at=-math.inf if worker in state.failed else state.due_at,
    )
    counted = run_events.Counted(
        worker=worker,
        round=state.round,
        num_examples=held.num_examples,
        updates=state.folded,
        needed=state.needed,
        train_s=event.train_s,
        bytes=event.size_bytes,
        staleness=staleness or None,
        weight=held.num_examples * _discount(state, held.round) if staleness else None,
    )
    out.append(Record(counted))
    return _without_work(state, ticket, event.now, out)


def fold_failed(state: State, event: FoldFailed, out: Effects) -> State:
    """Take in that an update could not be added to the sum."""
    ticket, held = event.ticket, state.received[event.ticket]
    worker = ticket.worker
    if event.again:
        resend = run_events.Resend(worker=worker, reason=event.reason)
        out += [Ack(held.handle), Record(resend)]
    else:
        out.append(Reject(held.handle, event.reason, event.cause))
    if held.spares:
        first, *rest = held.spares
        update = held._replace(handle=first, spares=tuple(rest))
        if state.phase is not Phase.COMMITTING:  # then it would get into the next round's sum
            out.append(_fold(state, ticket, update))
        return _with(state, ticket, update)
    was_asked = state.answer(worker) is held
    state = state.of(worker, received=state.received.discard(ticket))
    if not event.again:  # asked again, it would send the same again: if it was the worker at all
        base = state.base_of(held.round) or state.base
        out.append(_judged(ticket, held.round, base, event.reason, event.cause))
        state = state.but(
            doubted=state.doubted.insert(worker, event.reason),
            # So when it is asked again, that is another attempt.
            attempts=state.attempts.insert(worker, state.attempts.get(worker, 0) + 1),
        )
        return settle_doubt(state, worker)
    if was_asked and worker in state.workers and state.phase is Phase.OPEN:
        return send_again(state, worker, event.now, out)
    return state


def committed(state: State, event: Committed, out: Effects) -> State:
    """Take in that a round is on disk: its updates are acknowledged, and the next one begins."""
    counted = set()
    late: dict[Ticket, Received] = {}
    carried: dict[Ticket, Received] = {}
    let_go, last = [], event.round >= state.rules.rounds or bool(event.enough)
    for ticket, update in state.received.items():
        if update.folded:
            counted.add(ticket)
        elif not last and _counts_later(state, update):
            carried[ticket] = update
            continue
        else:
            late[ticket] = update
        let_go += [update.handle, *update.spares]
    out += map(Ack, sorted(let_go))
    for ticket, update in sorted(late.items()):
        out.append(_late(ticket.worker, update.round, update.num_examples))
    for ticket, update in sorted(late.items()):
        out.append(_too_late(ticket, update.round, state.base_of(update.round) or state.base))
    done = run_events.Committed(
        round=event.round,
        participants=tuple(sorted({ticket.worker for ticket in counted})),
        num_examples=event.num_examples,
        timings=event.timings,
    )
    out.append(Record(done))
    for ticket in late:
        state = _without_work(state, ticket, event.now, out)
    state = _next_round(state, event, frozenset(counted), carried)
    in_order = sorted(carried, key=lambda ticket: carried[ticket].handle)  # in which they came
    out += [_fold(state, ticket, carried[ticket]) for ticket in in_order]
    return state


def _counts_later(state: State, update: Received) -> bool:
    """Whether an update that is not in this round's sum still counts in the next one's."""
    staleness = state.round + 1 - update.round
    return staleness <= state.schedule.max_staleness and state.schedule.discount(staleness) > 0


def _unevaluated(state: State) -> frozenset[int]:
    """Return the versions without an evaluation that some worker may be at work on."""
    if not state.schedule.continuous:
        return frozenset()
    known = {number - 1 for number in state.earlier}
    pending = {state.round - 1} if state.evaluate_pending else set()
    return frozenset((state.unevaluated & known) | pending)


def _next_round(
    state: State,
    event: Committed,
    counted: frozenset[Ticket],
    carried: Mapping[Ticket, Received],
) -> State:
    state = state.but(
        counted_before=remembered(state, {**state.counted_before, event.round: counted}),
        earlier=still_matter(state, {**state.earlier, event.round: state.base}),
        phase=Phase.WAITING,
        round=event.round + 1,
        base=event.base,
        enough=event.enough,
        unevaluated=_unevaluated(state),
        evaluate_pending=True,
        evaluations=Table(),
        received=Table(carried),
        folded=0,
        asked_before=frozenset(),
        attempts=Table(),
        quorum_at=None,
        reopenings=0,
        reopened_with=0,
        gate=1,
        waiting_since=event.now,
    )
    if state.schedule.continuous:  # who is at work stays at it
        return state.recounted()
    return state.but(asked=Table(), failed=Table(), doubted=Table(), tally=Tally())
