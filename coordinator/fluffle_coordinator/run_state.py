"""What the round machine knows, hears and asks for: states, events and effects, all frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from fluffle_common.errors import Cause

Outcome = Literal["finished", "stopped"]


class Phase(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"  # for workers, or for the first weights
    OPEN = "open"  # work is out, updates come in
    COMMITTING = "committing"  # the average is being written to disk
    EVALUATING = "evaluating"  # the last model is being evaluated
    ENDED = "ended"


class Handle(NamedTuple):
    """A delivery: the link it came over (they are counted from 1) and its number on that link."""

    link: int
    number: int


@dataclass(frozen=True)
class Quorum:
    """How many updates close a round: a number, or a fraction of those expected.

    Example:
        >>> Quorum(number=2).of(3), Quorum(fraction=0.5).of(3), Quorum().of(3)
        (2, 2, 3)
    """

    number: int | None = None
    fraction: float = 1.0

    def of(self, expected: int) -> int:
        """Return how many of ``expected`` workers must have answered; at least 1."""
        if self.number is not None:
            return self.number
        # 0.1 * 30 is 3.0000000000000004 in binary; that is not a fourth worker.
        return max(1, math.ceil(self.fraction * expected - 1e-9))


@dataclass(frozen=True)
class Rules:
    """What the operator decided. Times in seconds.

    Args:
        rounds: how many rounds the run has.
        min_workers: how many workers must be present before the first round opens.
        quorum: how many updates close a round.
        grace_s: how long to wait for the others after the quorum.
        deadline_s: how long a round may stay open without a quorum.
        on_deadline: what happens then. ``reopen``: ask whoever is there now; ``close``: commit with
            what came if that is ``min_updates``, else reopen; ``stop``: end the run.
        min_updates: the fewest updates that ``close`` commits with.
        fraction: which part of the workers present is asked in a round.
        seed: decides who is asked.
        patience: how many heartbeats may fail to come before a worker counts as gone.
        max_reopenings: how often in a row a round is reopened without a single new update.
        wait_s: how long to wait for enough workers before the run stops.
        resend_s: how long a worker may be idle after work was sent to it before it is sent again.
    """

    rounds: int
    min_workers: int = 2
    quorum: Quorum = Quorum()
    grace_s: float = 0.0
    deadline_s: float = 600.0
    on_deadline: Literal["reopen", "close", "stop"] = "reopen"
    min_updates: int = 1
    fraction: float = 1.0
    seed: int = 0
    patience: int = 5
    max_reopenings: int = 3
    wait_s: float = 86400.0
    resend_s: float = 15.0


@dataclass(frozen=True)
class Worker:
    """What is known of a worker: what it said of itself, and when."""

    name: str
    session: str
    num_examples: int
    classes: tuple[str, ...]
    heartbeat_s: float
    last_seen: float
    state: str = "idle"
    run: str | None = None
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    task: str = ""

    def deadline(self, rules: Rules) -> float:
        """Return when it counts as gone unless it is heard of before."""
        return self.last_seen + rules.patience * self.heartbeat_s


@dataclass(frozen=True)
class Received:
    """An update that was taken in this round."""

    handle: Handle
    num_examples: int
    folded: bool = False
    spares: tuple[Handle, ...] = ()  # other copies, until we hold one that is known to be sound


@dataclass(frozen=True)
class Evaluated:
    """One worker's evaluation of a model."""

    num_examples: int
    loss: float
    metrics: Mapping[str, float]


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class State:
    """Everything the machine knows; ``start`` makes the first one."""

    rules: Rules
    run: str
    round: int  # the round that is open or will be; round - 1 is the last committed
    counted_before: frozenset[str] = frozenset()  # who took part in round - 1
    evaluate_pending: bool = False  # the model of round - 1 has no evaluation yet
    phase: Phase = Phase.WAITING
    link: int = 0  # which link we are on; 0: none
    unlinked_since: float = 0.0  # meant where there is none
    has_weights: bool = False
    init_asked: str | None = None
    classes: tuple[str, ...] | None = None
    gate: int = 1  # how many workers must be present to open the next round
    # Resumed: by then all who live have spoken up, and one is enough, since the dead will not.
    gate_until: float = math.inf
    waiting_since: float = 0.0
    workers: Mapping[str, Worker] = field(default_factory=_empty)
    asked: Mapping[str, float] = field(default_factory=_empty)  # when
    failed: Mapping[str, str] = field(default_factory=_empty)  # who could not, and why
    # Something unsound came in its name; it has failed if it says itself that it sent its update.
    doubted: Mapping[str, str] = field(default_factory=_empty)
    met: frozenset[str] = frozenset()  # who has been here at all: the end is told to all of them
    received: Mapping[str, Received] = field(default_factory=_empty)
    evaluations: Mapping[str, Evaluated] = field(default_factory=_empty)
    opened_at: float = 0.0
    quorum_at: float | None = None
    reopenings: int = 0
    reopened_with: int = 0  # updates that were there at the last reopening
    outcome: Outcome | None = None
    reason: str = ""

    @cached_property
    def expected(self) -> frozenset[str]:
        """Who was asked and has answered, or will: neither gone nor failed."""
        present = self.workers.keys() - self.failed.keys()
        return frozenset(self.asked.keys() & (present | self.received.keys()))

    @property
    def needed(self) -> int:
        """How many updates close the open round."""
        quorum = self.rules.quorum
        if quorum.number is not None:  # asked at every event: then nobody needs to be counted
            return quorum.number
        return quorum.of(len(self.expected))

    @cached_property
    def folded(self) -> int:
        """How many updates are in the running sum."""
        return sum(update.folded for update in self.received.values())

    @property
    def missing(self) -> tuple[str, ...]:
        """Who was asked and has not answered."""
        return tuple(sorted(w for w in self.asked if w not in self.received))

    @property
    def at_work_on(self) -> int:
        """The round that workers name while they are at what they were asked for."""
        return self.round - 1 if self.phase is Phase.EVALUATING else self.round

    def done(self, worker: str) -> bool:
        """Whether a worker says that it has sent its update of this round."""
        known = self.workers.get(worker)
        if known is None or known.state != "idle":
            return False
        return (known.run, known.round) == (self.run, self.round)

    def busy(self, worker: str) -> bool:
        """Whether a worker says that it is at work on what is asked for."""
        known = self.workers.get(worker)
        if known is None or (known.run, known.round) != (self.run, self.at_work_on):
            return False
        # Still training for the last round, it has not taken the order to evaluate its model.
        away = ("idle", "training") if self.phase is Phase.EVALUATING else ("idle",)
        return known.state not in away


# --- events: what the shell reports ------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something happened at ``now``."""

    now: float


@dataclass(frozen=True)
class Tick(Event):
    """Time passed; ``rounds.wakeup`` says when the next one is due."""


@dataclass(frozen=True)
class Connected(Event):
    """A new link; every handle of an earlier one is void, its delivery will come again."""

    link: int


@dataclass(frozen=True)
class Disconnected(Event):
    """The link is lost."""


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
    """The first weights are there and on disk."""


@dataclass(frozen=True)
class Arrived(Event):
    """An update's header was read and is in order; its tensors are yet to be checked."""

    handle: Handle
    run: str
    round: int
    worker: str
    num_examples: int


@dataclass(frozen=True)
class Folded(Event):
    """An update's tensors were checked and are in the running sum."""

    worker: str


@dataclass(frozen=True)
class FoldFailed(Event):
    """An update was not folded; ``again``: its tensors did not arrive whole, ask for them again."""

    worker: str
    reason: str
    cause: Cause = "tensors"
    again: bool = False


@dataclass(frozen=True)
class EvaluationArrived(Event):
    """A worker evaluated the model of ``round``."""

    run: str
    round: int
    worker: str
    evaluated: Evaluated


@dataclass(frozen=True)
class Committed(Event):
    """The round's weights and journal line are on disk; ``participants`` are in the average."""

    round: int
    participants: frozenset[str]


# --- effects: what the shell is to do ----------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """Something to be done."""


@dataclass(frozen=True)
class Tell(Effect):
    """Let people know: a line of the log, an event of the journal."""

    what: str
    fields: Mapping[str, Any] = field(default_factory=_empty)


@dataclass(frozen=True)
class Welcome(Effect):
    """Tell a worker that it is in."""

    worker: str


@dataclass(frozen=True)
class Refuse(Effect):
    """Tell a worker that it is not, and why."""

    worker: str
    session: str
    reason: str


@dataclass(frozen=True)
class AskInit(Effect):
    """Ask a worker for the first weights."""

    worker: str


@dataclass(frozen=True)
class SendFit(Effect):
    """Send the open round's work to these workers, in one publish."""

    workers: tuple[str, ...]
    evaluate: bool


@dataclass(frozen=True)
class SendEvaluate(Effect):
    """Send the last model to these workers, to be evaluated only."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Fold(Effect):
    """Check an update's tensors and add them to the running sum."""

    handle: Handle
    worker: str


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
    """Average, write the checkpoint and the journal line, fsync both; then report ``Committed``."""

    round: int


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
