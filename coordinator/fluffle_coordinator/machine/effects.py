"""The effects that the machine asks for, carried out in order by the shell around it.

A run event among them is to be reported, in the log and the journal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fluffle_common.errors import Cause
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.machine.events import Arrived
from fluffle_coordinator.machine.records import Evaluated, Handle, Outcome


@dataclass(frozen=True)
class Effect:
    """An instruction to the shell."""


@dataclass(frozen=True)
class Welcome(Effect):
    """Tell a worker that it takes part."""

    worker: str


@dataclass(frozen=True)
class Refuse(Effect):
    """Tell a worker that it cannot take part, with a reason for people and a code."""

    worker: str
    session: str
    reason: str
    code: str


@dataclass(frozen=True)
class Judge(Effect):
    """Send a worker the verdict that its update does not count, and why.

    After a rejection, the worker trains again: sending the same update again does not help.
    """

    update: Arrived
    outcome: Literal["late", "rejected"]
    reason: str
    cause: Cause | None = None


@dataclass(frozen=True)
class AskInit(Effect):
    """Ask a worker for the first weights."""

    worker: str


@dataclass(frozen=True)
class SendFit(Effect):
    """Send the open round's work to these workers, in one publish.

    Each gets the ticket (worker, ``sequence``). ``attempt`` counts how often its update for that
    ticket was rejected; for a new attempt, it trains again. ``frozen``: the frozen tensors go with
    it. ``repeat``: it was sent before, and nothing suggests that it was lost.
    """

    workers: tuple[str, ...]
    evaluate: bool
    sequence: int
    attempt: int = 0
    frozen: bool = False
    repeat: bool = False


@dataclass(frozen=True)
class SendEvaluate(Effect):
    """Send the last model to these workers, for evaluation only.

    ``frozen`` and ``repeat`` are as in ``SendFit``.
    """

    workers: tuple[str, ...]
    frozen: bool = False
    repeat: bool = False


@dataclass(frozen=True)
class Fold(Effect):
    """Check an update's tensors and add them to the running sum.

    Its weight is ``num_examples * discount``; it was trained from weights that are ``staleness``
    versions old. It is not added if its norm is above ``max_norm``.
    """

    update: Arrived
    max_norm: float = math.inf
    staleness: int = 0
    discount: float = 1.0


@dataclass(frozen=True)
class Ack(Effect):
    """Acknowledge a delivery."""

    handle: Handle


@dataclass(frozen=True)
class Forget(Effect):
    """Drop the body of a delivery whose update is in the sum; it stays unacknowledged."""

    handle: Handle


@dataclass(frozen=True)
class Reject(Effect):
    """Move a delivery to the rejected queue, with this reason, and acknowledge it."""

    handle: Handle
    reason: str
    cause: Cause


@dataclass(frozen=True)
class Commit(Effect):
    """Average, write the checkpoint and the history line, fsync both; then report ``Committed``.

    ``asked`` are the workers that were asked in the round, for the history.
    """

    round: int
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordEvaluation(Effect):
    """Write the evaluation of a round's model to the history."""

    round: int
    evaluations: Mapping[str, Evaluated]


@dataclass(frozen=True)
class End(Effect):
    """Tell the workers that the run has ended, and exit."""

    outcome: Outcome
    reason: str
    workers: tuple[str, ...]


Effects = list[Effect | RunEvent]
