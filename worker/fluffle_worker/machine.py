"""The worker's pure state machine: it decides which work to do, to drop and to answer again.

``advance(state, event)`` returns the next state and a list of effects; no IO, no clock, no arrays.

::

    IDLE ──Asked──> WORKING ──Finished──> SENDING ──Sent──> IDLE (the answer is kept)
                      │  └──Asked (newer)──> Abandon, then WORKING on the newer
                      └──Failed──> IDLE

Rules:

- Work requested twice is done once. If it has been answered, the same answer is sent again.
- Newer work replaces older work. Older work never replaces newer work under way, but may follow
  it once that has been answered: a coordinator with a damaged checkpoint goes back a round.
- A lost link changes nothing: what the broker has not confirmed is sent again over the next link.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Work(NamedTuple):
    """The identity of a piece of work."""

    kind: Literal["init", "fit", "evaluate"]
    run: str
    round: int
    # The name of the weights to start from. A round's base changes if the coordinator crashed
    # before it committed the previous round and averaged that one again.
    base: str = ""
    attempt: int = 0  # how often the answer was rejected; a new attempt trains again
    sequence: int = 0  # of the ticket; it grows with each training, even from the same weights


class State(NamedTuple):
    """The state of the machine."""

    doing: Work | None = None  # in the training thread
    next: Work | None = None  # begins when the thread is free
    sending: Work | None = None  # done; the broker has not confirmed the answer yet
    answered: Work | None = None  # confirmed; the answer is kept until newer work arrives
    over: str | None = None  # why the run has ended


@dataclass(frozen=True)
class _OfWork:
    """An event or an effect that concerns a piece of work."""

    work: Work


# --- events ------------------------------------------------------------------------------------


class Asked(_OfWork):
    """The coordinator requested work."""


class Finished(_OfWork):
    """The training thread finished its work."""


@dataclass(frozen=True)
class Failed(_OfWork):
    """The task failed."""

    reason: str


class Abandoned(_OfWork):
    """The training thread stopped because its work was obsolete."""


class Sent(_OfWork):
    """The broker confirmed the answer."""


@dataclass(frozen=True)
class Rejected:
    """The coordinator rejected the update of a round and asks for another one."""

    run: str
    round: int
    base: str
    sequence: int = 0


@dataclass(frozen=True)
class Stopped:
    """The coordinator ended the run."""

    reason: str


Event = Asked | Finished | Failed | Abandoned | Sent | Rejected | Stopped

# --- effects -----------------------------------------------------------------------------------


class Begin(_OfWork):
    """Start the work in the training thread."""


class Abandon(_OfWork):
    """Signal the training thread that its work is obsolete."""


class Send(_OfWork):
    """Send the answer until the broker confirms it."""


class Drop(_OfWork):
    """Discard the job and its answer."""


@dataclass(frozen=True)
class Report(_OfWork):
    """Report the task's failure to the coordinator."""

    reason: str


@dataclass(frozen=True)
class Leave:
    """Leave the run, which has ended."""

    reason: str


Effect = Begin | Abandon | Send | Drop | Report | Leave


def advance(state: State, event: Event) -> tuple[State, list[Effect]]:
    """Return the state after ``event``, and the effects to carry out, in order."""
    match event:
        case Asked(work):
            return _asked(state, work)
        case Finished(work) if work == state.doing:
            if state.next is not None:
                return _begin(state._replace(doing=None), [Drop(work)])
            return state._replace(doing=None, sending=work), [Send(work)]
        case Abandoned(work) if work == state.doing:
            return _begin(state._replace(doing=None), [Drop(work)])
        case Failed(work, reason) if work == state.doing:
            return _begin(state._replace(doing=None), [Drop(work), Report(work, reason)])
        case Sent(work) if work == state.sending:
            return state._replace(sending=None, answered=work), []
        case Rejected():
            return _rejected(state, event)
        case Stopped(reason):
            effects: list[Effect] = [Leave(reason)]
            if state.doing is not None:
                effects.insert(0, Abandon(state.doing))
            return state._replace(next=None, over=reason), effects
    return state, []


def _rejected(state: State, event: Rejected) -> tuple[State, list[Effect]]:
    """Discard a confirmed answer, so that the same work trains again when requested."""
    work, rejected = state.answered, (event.run, event.round, event.base, event.sequence)
    if work is None or work.kind != "fit":
        return state, []
    if (work.run, work.round, work.base, work.sequence) != rejected:
        return state, []
    return state._replace(answered=None), [Drop(work)]


def _asked(state: State, work: Work) -> tuple[State, list[Effect]]:
    if work in (state.doing, state.next, state.sending):
        return state, []
    if work == state.answered:
        return state._replace(answered=None, sending=work), [Send(work)]
    if any(_newer(known, work) for known in (state.doing, state.next, state.sending)):
        return state, []
    effects: list[Effect] = [
        Drop(old) for old in (state.next, state.sending, state.answered) if old is not None
    ]
    state = state._replace(next=work, sending=None, answered=None)
    if state.doing is not None:
        return state, [*effects, Abandon(state.doing)]
    return _begin(state, effects)


def _begin(state: State, effects: list[Effect]) -> tuple[State, list[Effect]]:
    if state.next is None:
        return state, effects
    work = state.next
    return state._replace(doing=work, next=None), [*effects, Begin(work)]


def _newer(known: Work | None, work: Work) -> bool:
    """Return whether ``known`` belongs to the same run as ``work`` and comes later.

    The evaluation of round n's model comes after the training of round n.
    """
    if known is None or known.run != work.run:
        return False
    return _order(known) > _order(work)


def _order(work: Work) -> tuple[int, ...]:
    kind = ("init", "fit", "evaluate").index(work.kind)
    return work.round, kind, work.sequence, work.attempt
