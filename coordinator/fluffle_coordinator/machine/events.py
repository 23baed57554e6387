"""What the round machine hears: frozen data, made by the shell around it (``coordinator``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fluffle_common.errors import Cause
from fluffle_coordinator.machine.state import Evaluated, Handle, Ticket, Worker


@dataclass(frozen=True)
class Event:
    """Something happened at ``now``."""

    now: float


@dataclass(frozen=True)
class Tick(Event):
    """Time passed; ``machine.wakeup`` says when the next one is due."""


@dataclass(frozen=True)
class Connected(Event):
    """A new link; every handle of an earlier one is void, its delivery will come again."""

    link: int


@dataclass(frozen=True)
class Disconnected(Event):
    """The link is lost."""


@dataclass(frozen=True)
class Echoed(Event):
    """What the coordinator sent itself over a link came back, the way that signs of life come.

    So everything that was in that queue before it has been read.
    """

    link: int


@dataclass(frozen=True)
class Seen(Event):
    """A sign of life; ``hello`` where the worker has (re)connected."""

    worker: Worker
    hello: bool


@dataclass(frozen=True)
class Left(Event):
    """A worker said good-bye."""

    worker: str
    session: str
    reason: str


@dataclass(frozen=True)
class Failed(Event):
    """A worker's task failed; round 0: it could not make the first weights."""

    worker: str
    run: str
    round: int
    reason: str


@dataclass(frozen=True)
class InitLost(Event):
    """The first weights that a worker sent did not arrive whole."""

    worker: str


@dataclass(frozen=True)
class WeightsReady(Event):
    """The first weights are there and on disk; ``base`` names them.

    ``frozen`` is the digest of the frozen tensors that came with them; empty if none did.
    """

    base: str
    frozen: str = ""


@dataclass(frozen=True)
class Arrived(Event):
    """An update's header was read and is in order; its tensors are yet to be checked.

    It was trained from the weights ``base``, which ``round`` began with.
    """

    handle: Handle
    run: str
    round: int
    ticket: Ticket
    num_examples: int
    base: str


@dataclass(frozen=True)
class Folded(Event):
    """An update's tensors were checked and are in the running sum.

    Training took ``train_s``; its tensors came in ``size_bytes``, and its delta has the Euclidean
    norm ``norm``.
    """

    ticket: Ticket
    train_s: float
    size_bytes: int
    norm: float = 0.0


@dataclass(frozen=True)
class FoldFailed(Event):
    """An update was not folded; ``again``: its tensors did not arrive whole, ask for them again."""

    ticket: Ticket
    reason: str
    cause: Cause = "tensors"
    again: bool = False


@dataclass(frozen=True)
class EvaluationArrived(Event):
    """A worker evaluated the model of ``round``, whose weights are ``base``."""

    run: str
    round: int
    worker: str
    evaluated: Evaluated
    base: str


@dataclass(frozen=True)
class Committed(Event):
    """The round's weights, named ``base``, and its history line are on disk.

    ``num_examples`` are in it, and ``timings`` say where its time went, in seconds. ``enough`` says
    why no further round is wanted; it is empty where only ``Rules.rounds`` decides.
    """

    round: int
    base: str
    num_examples: int | None = None
    timings: Mapping[str, float] | None = None
    enough: str = ""
