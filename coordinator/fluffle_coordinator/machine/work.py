"""Work: which tickets workers are issued, and the effects that send them their work."""

from __future__ import annotations

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.clock import schedule_check
from fluffle_coordinator.machine.effects import Effects, SendEvaluate, SendFit
from fluffle_coordinator.machine.state import Issued, Phase, State, Table


def send_work(
    state: State, workers: tuple[str, ...], now: float, out: Effects, *, repeat: bool = False
) -> State:
    """Send these workers what ``State.asked`` says, and the frozen tensors that they lack.

    Each effect is one message, which says that it is a ``repeat``.
    """
    evaluating = state.phase is Phase.EVALUATING
    recipients: dict[tuple[bool, int, int], list[str]] = {}
    for name in workers:
        ticket = (0, 0) if evaluating else (state.asked[name].sequence, state.attempts.get(name, 0))
        recipients.setdefault((_lacks_frozen(state, name, now), *ticket), []).append(name)
    for (lacking, sequence, attempt), listed in sorted(recipients.items()):
        names = tuple(listed)
        if evaluating:
            out.append(SendEvaluate(names, lacking, repeat))
        else:
            evaluate = state.evaluate_pending
            out.append(SendFit(names, evaluate, sequence, attempt, lacking, repeat))
        if lacking:
            if not repeat:  # which may be dropped (see Outbox)
                out.append(run_events.FrozenSent(workers=names, digest=state.frozen))
            sessions = (state.workers[name].session for name in names)
            sent = {**state.frozen_sent, **dict.fromkeys(sessions, now)}
            state = state.replace(frozen_sent=Table(sent))
    return state


def _lacks_frozen(state: State, name: str, now: float) -> bool:
    """Whether a worker lacks the frozen tensors, and they are not on their way to it.

    They are on their way until a link is lost, or none of their parts has arrived for long.
    """
    worker = state.workers.get(name)
    if not state.frozen or worker is None or state.frozen in worker.frozen:
        return False
    sent_at = state.frozen_sent.get(worker.session)
    if sent_at is None:
        return True
    arrived_at = worker.moved_at if worker.has_steps else worker.joined_at
    return now - max(sent_at, arrived_at) >= 4 * state.rules.resend_s


def assign_work(state: State, workers: tuple[str, ...], now: float, out: Effects) -> State:
    """Send the open version to idle workers, each with a ticket."""
    if not workers:
        return state
    state = next_sequence(state)
    issued = Issued(now, state.sequence, state.round)
    for name in workers:
        state = issue(state, name, issued)
    return note_asked(send_work(state, workers, now, out), workers)


def issue(state: State, name: str, issued: Issued) -> State:
    """Note what a worker is asked for, and make sure that it is checked in time."""
    return schedule_check(state.replace_for(name, asked=state.asked.insert(name, issued)), name)


def note_asked(state: State, workers: tuple[str, ...]) -> State:
    """Note the round that workers were last asked in, for selections that need it."""
    if not state.selects:
        return state
    asked_in = state.asked_in
    for name in workers:
        asked_in = asked_in.insert(name, state.round)
    return state.replace(asked_in=asked_in)


def next_sequence(state: State) -> State:
    """Advance the sequence for new work; if each worker is asked once a round, to the round."""
    continuous = state.schedule.continuous
    return state.replace(sequence=state.sequence + 1 if continuous else state.round)


def resend_work(
    state: State, worker: str, now: float, out: Effects, *, repeat: bool = False
) -> State:
    """Send a worker its work again, or new work if there are newer weights.

    ``repeat``: for no reason but the time that has passed.
    """
    issued = state.asked[worker]
    if state.phase is Phase.OPEN and issued.round != state.round:
        return assign_work(state, (worker,), now, out)
    issued = issued._replace(at=now, repeats=issued.repeats + 1 if repeat else 0)
    state = state.replace_for(worker, asked=state.asked.insert(worker, issued))
    return send_work(state, (worker,), now, out, repeat=repeat)
