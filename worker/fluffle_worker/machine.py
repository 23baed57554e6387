"""What a worker does next, as a pure state machine: newest work wins, answers are kept.

``advance(state, event)`` returns the next state and what is to be done; no IO, no clock, no arrays.

::

    IDLE ──Asked──> WORKING ──Finished──> SENDING ──Sent──> IDLE (the answer is kept)
                      │  └──Asked (newer)──> Abandon, then WORKING on the newer
                      └──Failed──> IDLE

Rules: work asked for twice is done once; an answered work asked for again is answered again with
the same answer, not with a new one; older work never replaces newer that is under way (once that is
answered, it may: a coordinator whose last checkpoint is damaged goes back a round); a lost link
changes nothing, since whatever was not confirmed is sent again over the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Work(NamedTuple):
    """One thing asked of a worker, known by what it is, for which round of which run.

    ``base`` names the weights that it begins with; those of a round are others after a coordinator
    that died has averaged the round before it again. ``attempt`` counts how often the answer was
    rejected: after that, the work is done anew. ``sequence`` is the ticket of a training: it grows
    with every piece of work, also if that begins with the same weights.
    """

    kind: Literal["init", "fit", "evaluate"]
    run: str
    round: int
    base: str = ""
    attempt: int = 0
    sequence: int = 0


class State(NamedTuple):
    """Everything the machine knows."""

    doing: Work | None = None  # in the training thread
    next: Work | None = None  # begins when the thread is free
    sending: Work | None = None  # done, its answer not yet taken by the broker
    answered: Work | None = None  # taken; the answer is kept until there is newer work
    over: str | None = None


# --- events ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """The coordinator asks for work."""

    work: Work


@dataclass(frozen=True)
class Finished:
    """The thread is done with a work."""

    work: Work


@dataclass(frozen=True)
class Failed:
    """The task failed at a work."""

    work: Work
    reason: str


@dataclass(frozen=True)
class Abandoned:
    """The thread noticed that its work is not wanted any more."""

    work: Work


@dataclass(frozen=True)
class Sent:
    """The broker took the answer to a work."""

    work: Work


@dataclass(frozen=True)
class Rejected:
    """The coordinator does not take the update of a round from these weights: it is no answer."""

    run: str
    round: int
    base: str
    sequence: int = 0


@dataclass(frozen=True)
class Stopped:
    """The coordinator says that the run has ended."""

    reason: str


Event = Asked | Finished | Failed | Abandoned | Sent | Rejected | Stopped

# --- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Begin a work in the thread."""

    work: Work


@dataclass(frozen=True)
class Abandon:
    """Let the thread know that its work is not wanted any more."""

    work: Work


@dataclass(frozen=True)
class Send:
    """Send the answer to a work, until the broker has taken it."""

    work: Work


@dataclass(frozen=True)
class Drop:
    """Let go of the answer to a work: newer work has come."""

    work: Work


@dataclass(frozen=True)
class Report:
    """Tell the coordinator that the task failed."""

    work: Work
    reason: str


@dataclass(frozen=True)
class Leave:
    """The run has ended: nothing more to do here."""

    reason: str


Effect = Begin | Abandon | Send | Drop | Report | Leave


def advance(state: State, event: Event) -> tuple[State, list[Effect]]:
    """Take one event; return the next state and what is to be done, in this order."""
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
    """Forget an answer that was taken: asked for again, its work is done anew."""
    work, of = state.answered, (event.run, event.round, event.base, event.sequence)
    if work is None or work.kind != "fit":
        return state, []
    if (work.run, work.round, work.base, work.sequence) != of:
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
    """Whether ``known`` is of the same run and later than ``work``.

    The evaluation of round n's model comes after the training of round n.
    """
    if known is None or known.run != work.run:
        return False
    return _order(known) > _order(work)


def _order(work: Work) -> tuple[int, ...]:
    kind = ("init", "fit", "evaluate").index(work.kind)
    return work.round, kind, work.sequence, work.attempt
