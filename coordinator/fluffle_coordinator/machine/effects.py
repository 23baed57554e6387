"""What the round machine asks for: frozen data, done by the shell around it, in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fluffle_common.errors import Cause
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.machine.state import Evaluated, Handle, Outcome, Ticket


@dataclass(frozen=True)
class Effect:
    """Something to be done."""


@dataclass(frozen=True)
class Record(Effect):
    """Let people know: a line of the log, an entry of the journal."""

    event: RunEvent


@dataclass(frozen=True)
class Welcome(Effect):
    """Tell a worker that it is in."""

    worker: str


@dataclass(frozen=True)
class Refuse(Effect):
    """Tell a worker that it is not, and why: in words, and in one word."""

    worker: str
    session: str
    reason: str
    code: str


@dataclass(frozen=True)
class Judge(Effect):
    """Tell a worker that its update does not count, and why.

    ``train_again``: the same update is no answer any more.
    """

    ticket: Ticket
    round: int
    base: str
    outcome: Literal["late", "rejected"]
    reason: str
    cause: Cause | None = None
    train_again: bool = False


@dataclass(frozen=True)
class AskInit(Effect):
    """Ask a worker for the first weights."""

    worker: str


@dataclass(frozen=True)
class Opened(Effect):
    """The round is open from this moment on."""


@dataclass(frozen=True)
class SendFit(Effect):
    """Send the open round's work to these workers, in one publish.

    Each gets the ticket (worker, ``sequence``). ``attempt`` counts how often its update of that was
    rejected: after that, the same one is no answer. ``frozen``: the frozen tensors go with it.
    """

    workers: tuple[str, ...]
    evaluate: bool
    sequence: int
    attempt: int = 0
    frozen: bool = False


@dataclass(frozen=True)
class SendEvaluate(Effect):
    """Send the last model to these workers, to be evaluated only.

    ``frozen``: the frozen tensors go with it.
    """

    workers: tuple[str, ...]
    frozen: bool = False


@dataclass(frozen=True)
class Fold(Effect):
    """Check an update's tensors and add them to the running sum.

    It weighs ``num_examples * discount`` there, as one that was trained from weights ``staleness``
    versions old. One whose norm is above ``max_norm`` is not added.
    """

    handle: Handle
    ticket: Ticket
    num_examples: int
    max_norm: float = math.inf
    staleness: int = 0
    discount: float = 1.0


@dataclass(frozen=True)
class Ack(Effect):
    """Acknowledge a delivery: its story is over."""

    handle: Handle


@dataclass(frozen=True)
class Reject(Effect):
    """Put a delivery into the rejected queue with this reason, and acknowledge it."""

    handle: Handle
    reason: str
    cause: Cause


@dataclass(frozen=True)
class Commit(Effect):
    """Average, write the checkpoint and the history line, fsync both; then report ``Committed``.

    ``asked`` is whom the round was asked of, for the history.
    """

    round: int
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordEvaluation(Effect):
    """Write the federated evaluation of a round's model."""

    round: int
    evaluations: Mapping[str, Evaluated]


@dataclass(frozen=True)
class End(Effect):
    """The run is over: tell the workers and leave."""

    outcome: Outcome
    reason: str
    workers: tuple[str, ...]


Effects = list[Effect]
