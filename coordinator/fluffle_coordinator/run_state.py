"""What the round machine knows, as frozen data; ``events`` are heard, ``effects`` asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from fluffle_coordinator.effects import Tell

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
    base: str | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    task: str = ""

    def deadline(self, rules: Rules) -> float:
        """Return when it counts as gone unless it is heard of before."""
        return self.last_seen + rules.patience * self.heartbeat_s


class Received(NamedTuple):
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


class Saving(NamedTuple):
    """A round that is averaged and being written, while later ones have begun already.

    Args:
        round: its number.
        held: every delivery of an update of it, with its worker and number of examples; none is
            acknowledged before the round is on disk.
        told: what is to be told of the next round, once this one is committed.
    """

    round: int
    held: tuple[tuple[Handle, str, int], ...]
    told: tuple[Tell, ...] = ()

    def then(self, tell: Tell) -> Saving:
        """Return this with one more thing to be told."""
        return self._replace(told=(*self.told, tell))


_UNKNOWN = {"_expected": None}  # what a state keeps once it is asked for it


def empty() -> Mapping[Any, Any]:
    """Return a mapping that stays empty, as a default."""
    return MappingProxyType({})


@dataclass(frozen=True)
class State:
    """Everything the machine knows; ``start`` makes the first one."""

    rules: Rules
    run: str
    round: int  # the round that is open or will be; round - 1 is the last averaged
    base: str = ""  # names the weights that this round is trained from
    saving: tuple[Saving, ...] = ()  # the last rounds before, in order, until they are on disk
    # Who took part in the last round on disk, and in those before it whose updates may come again.
    counted_before: Mapping[int, frozenset[str]] = field(default_factory=empty)
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
    workers: Mapping[str, Worker] = field(default_factory=empty)
    asked: Mapping[str, float] = field(default_factory=empty)  # when
    failed: Mapping[str, str] = field(default_factory=empty)  # who could not, and why
    # Something unsound came in its name; it has failed if it says itself that it sent its update.
    doubted: Mapping[str, str] = field(default_factory=empty)
    met: frozenset[str] = frozenset()  # who has been here at all: the end is told to all of them
    received: Mapping[str, Received] = field(default_factory=empty)
    folded: int = 0  # how many of them are in the running sum
    evaluations: Mapping[str, Evaluated] = field(default_factory=empty)
    opened_at: float = 0.0
    quorum_at: float | None = None
    reopenings: int = 0
    reopened_with: int = 0  # updates that were there at the last reopening
    outcome: Outcome | None = None
    reason: str = ""

    def but(self, **changes: Any) -> State:
        """Return this with other values.

        As ``dataclasses.replace`` does, in a sixth of its time, which most of the machine's was: it
        would set every field anew, and there are ten changes or more a round and a worker.
        """
        assert changes.keys() <= self.__dataclass_fields__.keys()
        made = object.__new__(State)
        made.__dict__.update({**self.__dict__, **_UNKNOWN, **changes})
        return made

    @property
    def expected(self) -> frozenset[str]:
        """Who was asked and has answered, or will: neither gone nor failed."""
        found: frozenset[str] | None = self.__dict__.get("_expected")
        if found is None:
            present = self.workers.keys() - self.failed.keys()
            found = frozenset(self.asked.keys() & (present | self.received.keys()))
            self.__dict__["_expected"] = found
        return found

    @property
    def committed(self) -> int:
        """The last round that is on disk."""
        return max(self.counted_before, default=0)

    @property
    def needed(self) -> int:
        """How many updates close the open round."""
        quorum = self.rules.quorum
        if quorum.number is not None:  # asked at every event: then nobody needs to be counted
            return quorum.number
        return quorum.of(len(self.expected))

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
        return self._is_at(known, self.round)

    def busy(self, worker: str) -> bool:
        """Whether a worker says that it is at work on what is asked for."""
        known = self.workers.get(worker)
        if known is None or not self._is_at(known, self.at_work_on):
            return False
        # Still training for the last round, it has not taken the order to evaluate its model.
        away = ("idle", "training") if self.phase is Phase.EVALUATING else ("idle",)
        return known.state not in away

    def _is_at(self, worker: Worker, number: int) -> bool:
        """Whether a worker is at a round of this run, or did it last, from our weights.

        Not all say which weights they began with.
        """
        same_round = (worker.run, worker.round) == (self.run, number)
        return same_round and worker.base in (None, self.base)
