"""The events that the machine takes in, made by the shell around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fluffle_common.errors import Cause
from fluffle_coordinator.machine.records import Evaluated, Handle, Ticket, Worker


@dataclass(frozen=True)
class Event:
    """Something that happened at ``now``."""

    now: float


@dataclass(frozen=True)
class Tick(Event):
    """Time passed; ``machine.wakeup`` says when the next one is due."""


@dataclass(frozen=True)
class Connected(Event):
    """A new link; handles of earlier links are void, and their deliveries come again."""

    link: int


@dataclass(frozen=True)
class Disconnected(Event):
    """The link is lost."""


@dataclass(frozen=True)
class Echoed(Event):
    """The echo that the coordinator sent itself through the queue of heartbeats came back.

    So everything that was in that queue when the echo was sent has been read.
    """

    link: int


@dataclass(frozen=True)
class Seen(Event):
    """A worker was heard; ``hello`` if it has just connected or reconnected."""

    worker: Worker
    hello: bool


@dataclass(frozen=True)
class Left(Event):
    """A worker said goodbye."""

    worker: str
    session: str
    reason: str


@dataclass(frozen=True)
class Failed(Event):
    """A worker's task failed; in round 0, while it made the first weights."""

    worker: str
    run: str
    round: int
    reason: str


@dataclass(frozen=True)
class InitLost(Event):
    """The first weights that a worker sent did not arrive completely."""

    worker: str


@dataclass(frozen=True)
class WeightsReady(Event):
    """The first weights are on disk; ``base`` is their name.

    ``frozen`` is the digest of the frozen tensors that came with them; empty if none did.
    """

    base: str
    frozen: str = ""


@dataclass(frozen=True)
class Arrived(Event):
    """An update arrived with a valid header; its tensors are not checked yet.

    It was trained from the weights named ``base``, those of ``round``, in ``train_s``. Its tensors
    have ``size_bytes`` as they were sent.
    """

    run: str
    handle: Handle
    ticket: Ticket
    round: int
    base: str
    num_examples: int
    train_s: float
    size_bytes: int


@dataclass(frozen=True)
class Folded(Event):
    """An update's tensors were checked and added to the running sum; ``norm`` is its delta's."""

    ticket: Ticket
    norm: float = 0.0


@dataclass(frozen=True)
class FoldFailed(Event):
    """An update could not be folded; ``again`` if its tensors did not arrive completely."""

    ticket: Ticket
    reason: str
    cause: Cause = "tensors"
    again: bool = False


@dataclass(frozen=True)
class EvaluationArrived(Event):
    """A worker evaluated the model of ``round``, whose weights are named ``base``."""

    run: str
    round: int
    worker: str
    evaluated: Evaluated
    base: str


@dataclass(frozen=True)
class Committed(Event):
    """The round's new weights, named ``base``, and its history line are on disk.

    ``num_examples`` is the sum over its updates, and ``timings`` are the seconds that each step
    took. ``enough`` says why the run finishes now; if empty, only ``Rules.rounds`` decides.
    """

    round: int
    base: str
    num_examples: int | None = None
    timings: Mapping[str, float] | None = None
    enough: str = ""
