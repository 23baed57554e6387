"""What the round machine knows, as frozen data; ``events`` are heard, ``effects`` asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from rpds import HashTrieMap

from fluffle_common.protocol.messages import ModelForm
from fluffle_coordinator.machine.rules import Quorum, Rules
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Candidate

__all__ = ["Quorum", "Rules", "State", "Table"]

# A mapping that shares what it has with the one it was made from, so that a change takes the same
# time with four workers and with four thousand.
Table = HashTrieMap

Outcome = Literal["finished", "stopped"]
TICKETS_LEFT_OUT = 10_000
"""How many sequences a coordinator leaves out, where work outlives its round.

The one before it may have issued some that nobody has counted yet. And they are greater than the
round, which is the sequence of those that bring no ticket back.
"""
# Of so many rounds it is remembered what is in them, so that a copy is not taken for late.
_REMEMBERED = 3


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


class Ticket(NamedTuple):
    """What an update brings back: whose it is, and which piece of that worker's work it answers."""

    worker: str
    sequence: int


class Issued(NamedTuple):
    """What a worker was asked for: when (-inf: what was sent may be lost), and from which round."""

    at: float
    sequence: int
    round: int


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
    sequence: int | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    task: str = ""
    model: ModelForm | None = None
    features: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # the digests of the frozen tensors that it holds
    joined_at: float = 0.0  # when this process of it was first heard
    moved_at: float = 0.0  # when what it says of its work last changed
    stalled: bool = False  # people were told that it stands still

    def deadline(self, rules: Rules) -> float:
        """Return when it counts as gone unless it is heard of before."""
        return self.last_seen + rules.patience * self.heartbeat_s

    @property
    def at(self) -> tuple[object, ...]:
        """What it says of its work: where that changes, it advances."""
        return self.session, self.state, self.run, self.round, self.sequence, self.base, self.step

    @property
    def has_steps(self) -> bool:
        """Whether it is at something that advances in steps, which can stand still."""
        return self.steps > 0 and self.state in ("receiving", "training", "sending")


class Received(NamedTuple):
    """An update that was taken in this round; ``num_examples`` is the weight that it has.

    It was trained from the weights that ``round`` began with, this one or one before.
    """

    handle: Handle
    num_examples: int
    round: int
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
    schedule: Schedule[State]
    base: str = ""  # names the weights that this round is trained from
    # And those of the rounds before whose updates still count.
    earlier: Mapping[int, str] = field(default_factory=empty)
    sequence: int = 0  # the last that was issued; meant where work outlives its round
    # What is counted in the last rounds: when an acknowledgement is lost, an update comes again.
    counted_before: Mapping[int, frozenset[Ticket]] = field(default_factory=empty)
    enough: str = ""  # why no further round is wanted, before all of them are done
    unevaluated: frozenset[int] = frozenset()  # older versions that somebody may yet evaluate
    evaluate_pending: bool = False  # the model of round - 1 has no evaluation yet
    phase: Phase = Phase.WAITING
    link: int = 0  # which link we are on; 0: none
    caught_up: bool = False  # everything that waited in the broker before this link is read
    unlinked_since: float = 0.0  # meant where there is none
    heard_at: float = 0.0  # when anybody was last heard, the coordinator's own echo included
    # No worker is gone or stands still before this, whose every time would else be looked at again.
    due_at: float = -math.inf
    quickest_s: float = math.inf  # the shortest time between the heartbeats of any worker
    has_weights: bool = False
    init_asked: str | None = None
    init_asked_at: float = 0.0
    classes: tuple[str, ...] | None = None
    model: ModelForm | None = None  # what the model of the federation is made of
    decided: bool = False  # whether those present have had their say about these two
    decided_by: str = ""  # who set these two, for people
    frozen: str = ""  # the digest of the model's frozen tensors; empty if it has none
    # When they were sent to workers that are connected and have not said yet that they hold them.
    frozen_sent: Table[str, float] = field(default_factory=Table)
    gate: int = 1  # how many workers must be present to open the next round
    # Resumed: by then all who live have spoken up, and one is enough, since the dead will not.
    gate_until: float = math.inf
    waiting_since: float = 0.0
    workers: Table[str, Worker] = field(default_factory=Table)
    announced: Table[str, int] = field(default_factory=Table)  # how many examples each has
    greeted: Table[str, None] = field(
        default_factory=Table
    )  # whose old signs of life were answered on this link
    refused: Table[str, str] = field(default_factory=Table)  # and in which of its sessions
    asked: Table[str, Issued] = field(default_factory=Table)
    attempts: Table[str, int] = field(default_factory=Table)  # whose update was rejected, how often
    failed: Table[str, str] = field(default_factory=Table)  # who could not, and why
    # Something unsound came in its name; it has failed if it says itself that it sent its update.
    doubted: Table[str, str] = field(default_factory=Table)
    met: Table[str, None] = field(default_factory=Table)  # who was here: all are told of the end
    received: Table[Ticket, Received] = field(default_factory=Table)
    folded: int = 0  # how many of those that can close the round are in the running sum
    asked_in: Table[str, int] = field(default_factory=Table)  # the last round of each
    train_s: Table[str, float] = field(default_factory=Table)  # how long its last training took
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
        """Return this with other values; like ``dataclasses.replace``, and about 20 times faster.

        That sets each of some fifty fields anew, and with it a round takes the machine twice as
        long: there are ten changes or more a round and a worker.
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
        update = self.answer(worker)
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
        return self.schedule.needed(self)

    @property
    def missing(self) -> tuple[str, ...]:
        """Who was asked and has not answered."""
        return tuple(sorted(w for w in self.asked if self.answer(w) is None))

    def answer(self, worker: str) -> Received | None:
        """Return the update that a worker was asked for, if it is there."""
        issued = self.asked.get(worker)
        if issued is None:
            return None
        found = self.received.get(Ticket(worker, issued.sequence))
        if found is None and issued.sequence != issued.round:  # it does not bring tickets back
            found = self.received.get(Ticket(worker, issued.round))
        return found

    @property
    def selects(self) -> bool:
        """Whether not all are asked, so that it matters who was before, and how fast they were."""
        return self.rules.samples or self.schedule.continuous

    def candidates(self, names: Iterable[str]) -> Iterator[Candidate]:
        """Yield what a selection may know of these workers."""
        for name in names:
            yield Candidate(
                name,
                self.announced.get(name) or 1,
                self.asked_in.get(name) or 0,
                self.train_s.get(name),
            )

    def has_counted(self, ticket: Ticket, since: int = 0) -> bool:
        """Whether an update is in one of the last rounds, or of those ``since`` one."""
        before = self.counted_before.items()
        return any(ticket in counted for number, counted in before if number >= since)

    def base_of(self, number: int) -> str | None:
        """Return what the weights are named that a round began with, if they still matter."""
        return self.base if number == self.round else self.earlier.get(number)

    def at_work_on(self, worker: str) -> int:
        """Return the round that a worker names while it is at what it was asked for."""
        if self.phase is Phase.EVALUATING:
            return self.round - 1
        issued = self.asked.get(worker)
        return self.round if issued is None else issued.round

    def done(self, worker: str) -> bool:
        """Whether a worker says that it has sent the update that it was asked for."""
        known = self.workers.get(worker)
        if known is None or known.state != "idle" or self.phase is Phase.EVALUATING:
            return False
        return self._is_at_it(known)

    def busy(self, worker: str) -> bool:
        """Whether a worker says that it is at work on what is asked for.

        Of one that was not asked: on what would count.
        """
        known = self.workers.get(worker)
        if known is None or not self._is_at_it(known):
            return False
        # Still training for the last round, it has not taken the order to evaluate its model.
        away = ("idle", "training") if self.phase is Phase.EVALUATING else ("idle",)
        return known.state not in away

    def advancing(self, worker: str) -> bool:
        """Whether a worker is at work on what is asked for, and got further since the opening."""
        return self.busy(worker) and self.workers[worker].moved_at > self.opened_at

    def issued_before(self, worker: Worker, now: float) -> Issued | None:
        """Return what an earlier coordinator asked of a worker that is at it; None if it is not.

        What a worker says of its work may be older than its update.
        """
        ticket = Ticket(worker.name, worker.sequence or worker.round)
        over = ticket in self.received or self.has_counted(ticket)
        if over or worker.name in self.asked or not self.busy(worker.name):
            return None
        return Issued(now, ticket.sequence, worker.round)

    def _is_at_it(self, worker: Worker) -> bool:
        """Whether a worker is at what it was asked for, or did it last.

        Not all say which ticket they have, and which weights they began with.
        """
        if worker.run != self.run:
            return False
        if self.phase is Phase.EVALUATING:
            return worker.round == self.round - 1 and worker.base in (None, self.base)
        issued = self.asked.get(worker.name)
        if issued is None:
            base = self.base_of(worker.round)
            return base is not None and worker.base in (None, base)
        if worker.round != issued.round or worker.sequence not in (None, issued.sequence):
            return False
        return worker.base in (None, self.base_of(issued.round))


def remembered(
    state: State, counted: Mapping[int, frozenset[Ticket]]
) -> Mapping[int, frozenset[Ticket]]:
    """Keep what is counted in the last rounds; a copy of what is in an older one is late anyway."""
    oldest = max(counted, default=0) - max(_REMEMBERED, state.schedule.max_staleness + 1)
    return {number: tickets for number, tickets in counted.items() if number > oldest}


def still_matter(state: State, bases: Mapping[int, str]) -> Mapping[int, str]:
    """Keep the names of the weights that earlier rounds began with whose updates still count."""
    oldest = max(bases, default=0) - state.schedule.max_staleness
    return {number: base for number, base in bases.items() if number > oldest}
