"""What the round machine knows, as frozen data; ``events`` are heard, ``effects`` asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from rpds import HashTrieMap

from fluffle_common.protocol.messages import ModelForm
from fluffle_coordinator.machine.selection import sample_size

# A mapping that shares what it has with the one it was made from, so that a change takes the same
# time with four workers and with four thousand.
Table = HashTrieMap

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
        return sample_size(self.fraction, expected)


@dataclass(frozen=True)
class Rules:
    """What the operator decided. Times in seconds.

    Args:
        rounds: how many rounds the run has.
        min_workers: how many workers must be present before the first round opens.
        least: the fewest updates that a round commits with, whoever is lost, unless ``close`` says
            otherwise at its deadline.
        quorum: how many updates close a round.
        grace_s: how long to wait for the others after the quorum.
        deadline_s: how long a round may stay open without a quorum.
        on_deadline: what happens then. ``reopen``: ask whoever is there now; ``close``: commit with
            what came if that is ``min_updates``, else reopen; ``stop``: end the run.
        min_updates: the fewest updates that ``close`` commits with.
        max_examples: the largest weight that an update may have; None bounds it only by the number
            of examples that its worker announced.
        fraction: which part of the workers present is asked in a round.
        seed: decides who is asked.
        patience: how many heartbeats may fail to come before a worker counts as gone.
        max_reopenings: how often in a row a round is reopened with nothing new: no update, and no
            worker whose steps advance.
        max_round_s: how long a round may be open in all, however far its workers have come.
        stall_s: how long a training may stand still before people are told.
        stall_timeout_s: how long a training may stand still before it counts as failed; None waits.
        outlier_ratio: an update is far out if its norm is so many times the median of its round's.
        max_norm_ratio: refuse an update whose norm is more than so many times the median of the
            updates counted before it; None refuses none.
        wait_s: how long to wait for enough workers before the run stops.
        resend_s: how long a worker may be idle after work was sent to it before it is sent again.
        hearing_s: how long nobody may be heard, not even the coordinator's own echo, before time
            stops to count (see ``hearing``); less where workers speak so often that they would be
            gone by then. Infinity lets all time count.
    """

    rounds: int
    min_workers: int = 2
    least: int = 1
    quorum: Quorum = Quorum()
    grace_s: float = 0.0
    deadline_s: float = 600.0
    on_deadline: Literal["reopen", "close", "stop"] = "reopen"
    min_updates: int = 1
    max_examples: int | None = None
    fraction: float = 1.0
    seed: int = 0
    patience: int = 5
    max_reopenings: int = 3
    max_round_s: float = 86400.0
    stall_s: float = 120.0
    stall_timeout_s: float | None = None
    outlier_ratio: float = 10.0
    max_norm_ratio: float | None = None
    wait_s: float = 86400.0
    resend_s: float = 15.0
    hearing_s: float = 3.0

    def enough(self, present: int) -> bool:
        """Whether so many workers make a round that can close: the sample of them is no smaller."""
        least = max(self.least, self.quorum.number or 1)
        return self.fraction >= 1 or sample_size(self.fraction, present) >= least


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
    model: ModelForm | None = None
    joined_at: float = 0.0  # when this process of it was first heard
    moved_at: float = 0.0  # when what it says of its work last changed
    stalled: bool = False  # people were told that it stands still

    def deadline(self, rules: Rules) -> float:
        """Return when it counts as gone unless it is heard of before."""
        return self.last_seen + rules.patience * self.heartbeat_s

    @property
    def at(self) -> tuple[object, ...]:
        """What it says of its work: where that changes, it advances."""
        return self.session, self.state, self.run, self.round, self.base, self.step

    @property
    def has_steps(self) -> bool:
        """Whether it is at something that advances in steps, which can stand still."""
        return self.steps > 0 and self.state in ("receiving", "training", "sending")


class Received(NamedTuple):
    """An update that was taken in this round; ``num_examples`` is the weight that it has."""

    handle: Handle
    num_examples: int
    folded: bool = False
    spares: tuple[Handle, ...] = ()  # other copies, until we hold one that is known to be sound
    norm: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """One worker's evaluation of a model."""

    num_examples: int
    loss: float
    metrics: Mapping[str, float]


class Tally(NamedTuple):
    """How many of those asked are expected, and how many of these have not got so far.

    Kept up to date, since counting anew at every event would take time with the square of the
    workers.

    Args:
        expected: who was asked and has answered, or will: neither gone nor failed.
        unfolded: whose update is not in the sum.
        unevaluated: who has sent neither an evaluation nor an update.
    """

    expected: int = 0
    unfolded: int = 0
    unevaluated: int = 0


NOBODY = Tally()


def empty() -> Mapping[Any, Any]:
    """Return a mapping that stays empty, as a default."""
    return MappingProxyType({})


@dataclass(frozen=True)
class State:
    """Everything the machine knows; ``start`` makes the first one."""

    rules: Rules
    run: str
    round: int  # the round that is open or will be; round - 1 is the last committed
    base: str = ""  # names the weights that this round is trained from
    # Who took part in the last rounds: an acknowledgement that was lost lets an update come again.
    counted_before: Mapping[int, frozenset[str]] = field(default_factory=empty)
    enough: str = ""  # why no further round is wanted, before all of them are done
    evaluate_pending: bool = False  # the model of round - 1 has no evaluation yet
    phase: Phase = Phase.WAITING
    link: int = 0  # which link we are on; 0: none
    caught_up: bool = False  # everything that waited in the broker before this link is read
    unlinked_since: float = 0.0  # meant where there is none
    heard_at: float = 0.0  # when anybody was last heard, the coordinator's own echo included
    quickest_s: float = math.inf  # the shortest time between the heartbeats of any worker
    has_weights: bool = False
    init_asked: str | None = None
    init_asked_at: float = 0.0
    classes: tuple[str, ...] | None = None
    model: ModelForm | None = None  # what the model of the federation is made of
    decided: bool = False  # whether those present have had their say about these two
    decided_by: str = ""  # who set these two, for people
    gate: int = 1  # how many workers must be present to open the next round
    # Resumed: by then all who live have spoken up, and one is enough, since the dead will not.
    gate_until: float = math.inf
    waiting_since: float = 0.0
    workers: Table[str, Worker] = field(default_factory=Table)
    announced: Table[str, int] = field(default_factory=Table)  # how many examples each has
    greeted: frozenset[str] = frozenset()  # whose old signs of life were answered on this link
    refused: Table[str, str] = field(default_factory=Table)  # and in which of its sessions
    asked: Table[str, float] = field(default_factory=Table)  # when
    attempts: Table[str, int] = field(default_factory=Table)  # whose update was rejected, how often
    failed: Table[str, str] = field(default_factory=Table)  # who could not, and why
    # Something unsound came in its name; it has failed if it says itself that it sent its update.
    doubted: Table[str, str] = field(default_factory=Table)
    met: Table[str, None] = field(default_factory=Table)  # who was here: all are told of the end
    received: Table[str, Received] = field(default_factory=Table)
    folded: int = 0  # how many of them are in the running sum
    median_norm: float = 0.0  # of the updates in the last round that was averaged
    evaluations: Table[str, Evaluated] = field(default_factory=Table)
    tally: Tally = NOBODY
    opened_at: float = 0.0  # or opened again
    began_at: float = 0.0  # first opened
    quorum_at: float | None = None
    reopenings: int = 0
    reopened_with: int = 0  # updates that were there at the last reopening
    draws: int = 0  # how often this round's sample was drawn
    asked_before: frozenset[str] = frozenset()  # who was asked before the last draw of this round
    outcome: Outcome | None = None
    reason: str = ""

    def but(self, **changes: Any) -> State:
        """Return this with other values; like ``dataclasses.replace``, and about 6 times faster.

        It would set every field anew, and there are ten changes or more a round and a worker.
        """
        assert changes.keys() <= self.__dataclass_fields__.keys()
        made = object.__new__(State)
        object.__setattr__(made, "__dict__", {**self.__dict__, **changes})
        return made

    def of(self, worker: str, **changes: Any) -> State:
        """Return this with other values, all of which are about this one worker."""
        made = self.but(**changes)
        was, now = self._counts(worker), made._counts(worker)
        if was != now:
            all_in_all = zip(self.tally, was, now, strict=True)
            made.__dict__["tally"] = Tally._make([a - b + c for a, b, c in all_in_all])
        return made

    def without(self, worker: str) -> State:
        """Return this without a worker that is not there any more."""
        state = self.of(worker, workers=self.workers.discard(worker))
        return state.but(init_asked=None) if state.init_asked == worker else state

    def recounted(self, **changes: Any) -> State:
        """Return this with other values, about any number of workers."""
        made = self.but(**changes)
        counts = [made._counts(worker) for worker in made.asked]
        return made.but(tally=Tally(*map(sum, zip(*counts, strict=True))) if counts else Tally())

    def _counts(self, worker: str) -> tuple[bool, bool, bool]:
        """Whether it is expected, and as that unfolded and unevaluated."""
        if worker not in self.asked:
            return False, False, False
        update = self.received.get(worker)
        if update is not None:
            return True, not update.folded, False
        expected = worker in self.workers and worker not in self.failed
        return expected, expected, expected and worker not in self.evaluations

    @property
    def hearing_s(self) -> float:
        """How long nobody may be heard before time stops to count."""
        longest_s = self.rules.hearing_s
        if math.isinf(longest_s):
            return longest_s
        return min(longest_s, self.rules.patience * self.quickest_s / 2)

    @property
    def committed(self) -> int:
        """The last round that is on disk."""
        return self.round - 1

    @property
    def needed(self) -> int:
        """How many updates close the open round."""
        return max(self.rules.quorum.of(self.tally.expected), self.rules.least)

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

    def advancing(self, worker: str) -> bool:
        """Whether a worker is at work on what is asked for, and got further since the opening."""
        return self.busy(worker) and self.workers[worker].moved_at > self.opened_at

    def _is_at(self, worker: Worker, number: int) -> bool:
        """Whether a worker is at a round of this run, or did it last, from our weights.

        Not all say which weights they began with.
        """
        same_round = (worker.run, worker.round) == (self.run, number)
        return same_round and worker.base in (None, self.base)
