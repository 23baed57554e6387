"""The machine's state."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from operator import add, sub
from typing import Any, NamedTuple

from rpds import HashTrieMap, List

from fluffle_common.plural import listed
from fluffle_common.protocol.messages import ModelForm
from fluffle_coordinator.machine.events import Arrived
from fluffle_coordinator.machine.records import Evaluated, Handle, Outcome, Ticket, Worker
from fluffle_coordinator.machine.rules import Quorum, Rules
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Candidate, Draw, select

__all__ = ["Evaluated", "Handle", "Quorum", "Rules", "State", "Table", "Ticket", "Worker"]

# A persistent mapping: a changed copy shares its structure with the original, so that a change
# takes about as long with four workers as with four thousand.
Table = HashTrieMap

FIRST_WEIGHTS = "this run's first weights"
"""What decided on the model and the classes, if no worker and no option did."""

SEQUENCE_GAP = 10_000
"""How many sequences a coordinator skips for each start of the run, if work outlives its round.

An earlier coordinator may have issued some of them for updates that are still to come, although it
committed no round. The gap also keeps sequences above the round numbers, which stand in for the
sequence of workers that send no ticket.
"""


class Phase(StrEnum):
    """The phases of a run."""

    WAITING = "waiting"  # for workers, or for the first weights
    OPEN = "open"  # work is out, updates come in
    COMMITTING = "committing"  # the average is being written to disk
    EVALUATING = "evaluating"  # the last model is being evaluated
    ENDED = "ended"


class Issued(NamedTuple):
    """The work that a worker was last asked for."""

    at: float  # when it was sent; -inf if it may be lost
    sequence: int
    round: int  # the round whose weights it starts from
    repeats: int = 0  # how often it was sent again since, for no reason but the time

    def patience_s(self, resend_s: float) -> float:
        """Return how long to wait before it is sent again, which doubles with each repetition."""
        return resend_s * 2.0 ** min(self.repeats, 10)


class Tally(NamedTuple):
    """How many of the workers asked are expected to answer, and how far they are.

    Kept up to date with each change: counting anew at every event would make a round's time
    quadratic in the number of workers.
    """

    expected: int = 0  # workers that have answered or still can: neither gone nor failed
    unfolded: int = 0  # those whose update is not in the sum
    unevaluated: int = 0  # those that have sent neither an evaluation nor an update


@dataclass(frozen=True)
class State:
    """Everything the machine knows; ``machine.start`` makes the first state."""

    rules: Rules
    run: str
    round: int  # the open round, or the next one; round - 1 is the last committed
    schedule: Schedule[State]
    phase: Phase = Phase.WAITING
    enough: str = ""  # why the run finishes before its last round
    outcome: Outcome | None = None
    reason: str = ""

    # The link and the clock.
    link: int = 0  # the number of the current link; 0 if there is none
    caught_up: bool = False  # all that waited in the broker before this link is read
    unlinked_since: float = 0.0  # used while there is no link
    heard_at: float = 0.0  # when anyone was last heard, the coordinator's own echo included
    clock_stands: bool = False  # whether a tick has found that nobody was heard for too long
    hearing_s: float = math.inf  # how long the silence may last before the clock stops
    # No worker can be gone or stalled before this, so that not every tick checks all of them.
    due_at: float = -math.inf

    # Committed rounds.
    has_weights: bool = False
    frozen: str = ""  # the digest of the model's frozen tensors; empty if it has none
    # When they were last sent to each session of a worker, since its last hello.
    frozen_sent: Table[str, float] = field(default_factory=Table)
    base: str = ""  # the name of the weights that this round begins with
    outdated: bool = False  # whether a worker was found to be in a later round of this run
    earlier: Mapping[int, str] = field(default_factory=dict)  # the same for recent rounds
    # The tickets of recent rounds: an update is redelivered if its acknowledgement was lost.
    counted_before: Mapping[int, frozenset[Ticket]] = field(default_factory=dict)
    median_norms: tuple[float, ...] = ()  # of the updates of each of the last rounds

    # Before a round: enough workers, the vote on classes and model, the first weights.
    gate: int = 1  # how many workers must be present to open the next round
    # After a restart: by then every living worker was heard, and one is enough to go on.
    gate_until: float = math.inf
    waiting_since: float = 0.0
    classes: tuple[str, ...] | None = None
    model: ModelForm | None = None
    decided: bool = False  # whether the workers have voted on these two
    # Who or what decided on each of the two, for messages.
    classes_by: str = FIRST_WEIGHTS
    model_by: str = FIRST_WEIGHTS
    init_asked: str | None = None  # the worker that was asked for the first weights
    init_asked_at: float = 0.0
    init_lost_at: float = -math.inf  # when their parts were last missing
    init_after: float = math.inf  # when to ask for them again; infinity for at once

    # Workers.
    workers: Table[str, Worker] = field(default_factory=Table)  # those that are connected
    announced: Table[str, int] = field(default_factory=Table)  # each one's number of examples
    # Workers whose old heartbeats were answered on this link.
    greeted: Table[str, None] = field(default_factory=Table)
    refused: Table[str, str] = field(default_factory=Table)  # with the session that was refused
    asked_in: Table[str, int] = field(default_factory=Table)  # the last round each was asked in
    train_s: Table[str, float] = field(default_factory=Table)  # each one's last training time
    # The loss and the metrics of each one's last evaluation.
    evaluation: Table[str, Mapping[str, float]] = field(default_factory=Table)

    # The open round: its work.
    # Until this round, an earlier coordinator may have asked for updates with other settings.
    resumed_at: int = 0
    sequence: int = 0  # the last one issued; used if work outlives its round
    asked: Table[str, Issued] = field(default_factory=Table)
    asked_before: frozenset[str] = frozenset()  # who was asked in the round's earlier cohorts
    draws: int = 0  # how often the round's cohort was drawn
    tally: Tally = field(default_factory=Tally)
    failed: Table[str, str] = field(default_factory=Table)  # with the reason
    # Workers in whose name an unsound update arrived; see ``membership.settle_doubt``.
    doubted: Table[str, str] = field(default_factory=Table)
    attempts: Table[str, int] = field(default_factory=Table)  # rejected updates in this round

    # The open round: its updates and its timers.
    received: Table[Ticket, Arrived] = field(default_factory=Table)
    norms: Table[Ticket, float] = field(default_factory=Table)  # of those in the running sum
    # Other copies, some of which may be acknowledged; a worker may send any number of them.
    spares: Table[Ticket, List[Arrived]] = field(default_factory=Table)
    folded: int = 0  # how many of those in the sum count towards the quorum
    began_at: float = 0.0  # when the round was first opened
    opened_at: float = 0.0  # when it was last opened or reopened
    quorum_at: float | None = None  # when it reached its quorum
    reopenings: int = 0  # in a row, without progress
    reopened_with: int = 0  # how many updates there were at the last reopening

    # Evaluations.
    evaluate_pending: bool = False  # the model of round - 1 has no evaluation yet
    evaluations: Table[str, Evaluated] = field(default_factory=Table)
    unevaluated: frozenset[int] = frozenset()  # older versions that a worker may still evaluate

    def replace(self, **changes: Any) -> State:
        """Return a copy with other values; like ``dataclasses.replace``, and about 20 times faster.

        That one would double the machine's time for a round. Changes about workers' answers need
        ``replace_for`` or ``replace_and_recount``, which keep the tally.
        """
        assert changes.keys() <= self.__dataclass_fields__.keys()
        copy = object.__new__(State)
        object.__setattr__(copy, "__dict__", {**self.__dict__, **changes})
        return copy

    def replace_for(self, worker: str, **changes: Any) -> State:
        """Return a copy with other values, all of them about this worker; it updates the tally."""
        copy = self.replace(**changes)
        before, after = self._counts(worker), copy._counts(worker)
        if before != after:
            copy.__dict__["tally"] = Tally(*map(add, map(sub, self.tally, before), after))
        return copy

    def replace_and_recount(self, **changes: Any) -> State:
        """Return a copy with other values, about any number of workers; it counts the tally."""
        copy = self.replace(**changes)
        counts = [copy._counts(worker) for worker in copy.asked]
        copy.__dict__["tally"] = Tally(*map(sum, zip(*counts, strict=True))) if counts else Tally()
        return copy

    def without(self, worker: str) -> State:
        """Return a copy without a worker that is no longer connected."""
        state = self.replace_for(worker, workers=self.workers.discard(worker))
        return state.replace(init_asked=None) if state.init_asked == worker else state

    def _counts(self, worker: str) -> tuple[bool, bool, bool]:
        """Return what a worker adds to each count of the tally."""
        issued = self.asked.get(worker)
        if issued is None:
            return False, False, False
        update = self._answer_to(worker, issued)
        if update is not None:
            return True, update.ticket not in self.norms, False
        expected = worker in self.workers and worker not in self.failed
        return expected, expected, expected and worker not in self.evaluations

    @property
    def committed(self) -> int:
        """The last round that is on disk."""
        return self.round - 1

    @property
    def workers_needed(self) -> int:
        """How many workers must be present to open the next round."""
        return max(self.gate, self.rules.fewest_present)

    @property
    def workers_for_quorum(self) -> int:
        """How many workers the next round needs: to open and, later, to reach its quorum.

        A round may open with fewer, which train until the others have joined.
        """
        return max(
            self.workers_needed, 0 if self.schedule.continuous else self.rules.fewest_updates
        )

    @property
    def has_enough_workers(self) -> bool:
        """Whether enough workers are present to open the next round."""
        return len(self.workers) >= self.workers_needed

    @property
    def needed(self) -> int:
        """How many updates close the open round."""
        return self.schedule.needed(self)

    @property
    def known(self) -> tuple[str, ...]:
        """Every worker that was ever in the run, as far as the history and the messages tell."""
        return tuple(sorted({*self.announced, *self.asked_in}))

    @property
    def unheard(self) -> tuple[str, ...]:
        """The workers of the run that are not connected, as far as is known, nor refused."""
        return tuple(n for n in self.known if n not in self.workers and n not in self.refused)

    @property
    def and_refused(self) -> str:
        """Which workers were refused and have not joined since, for the end of a message."""
        return f"; refused: {listed(sorted(self.refused))}" if self.refused else ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The workers that were asked and have not answered."""
        return tuple(sorted(w for w in self.asked if self.answer(w) is None))

    def answer(self, worker: str) -> Arrived | None:
        """Return a worker's update for the work that it was asked for, if it has arrived."""
        issued = self.asked.get(worker)
        return None if issued is None else self._answer_to(worker, issued)

    def _answer_to(self, worker: str, issued: Issued) -> Arrived | None:
        update = self.received.get(Ticket(worker, issued.sequence))
        if update is None and issued.sequence != issued.round:  # the worker sends no tickets
            update = self.received.get(Ticket(worker, issued.round))
        return update

    @property
    def selects(self) -> bool:
        """Whether some workers are selected, so that their past rounds and speeds matter."""
        return self.rules.samples or self.schedule.continuous

    def select(
        self,
        names: Iterable[str],
        count: int,
        draw: Draw,
        *,
        last: Collection[str] = (),
        least: int = 1,
    ) -> tuple[str, ...]:
        """Return those of these workers that the run's selection chooses; see ``select``."""
        selection, names = self.rules.selection, sorted(names)
        if selection.fixed and count >= len(names):
            return tuple(names)
        candidates = [
            Candidate(
                name,
                self.announced.get(name) or 1,
                self.asked_in.get(name) or 0,
                self.train_s.get(name),
                self.evaluation.get(name),
            )
            for name in names
        ]
        return select(selection, candidates, count, draw, last, least=least)

    def has_counted(self, ticket: Ticket, since: int = 0) -> bool:
        """Whether one of the remembered rounds, from ``since`` on, counted this update."""
        before = self.counted_before.items()
        return any(ticket in counted for number, counted in before if number >= since)

    def base_of(self, number: int) -> str | None:
        """Return the name of the weights that a round began with, if its updates still count."""
        return self.base if number == self.round else self.earlier.get(number)

    def done(self, worker: str) -> bool:
        """Whether a worker reports that it has sent the update that it was asked for."""
        known = self.workers.get(worker)
        if known is None or known.state != "idle" or self.phase is Phase.EVALUATING:
            return False
        return self._is_on_task(known)

    def busy(self, worker: str) -> bool:
        """Whether a worker reports that it does the work that it was asked for.

        If it was not asked, whether it does work that would count.
        """
        known = self.workers.get(worker)
        if known is None or not self._is_on_task(known):
            return False
        # One that still trains for the last round has not read the request to evaluate its model.
        elsewhere = ("idle", "training") if self.phase is Phase.EVALUATING else ("idle",)
        return known.state not in elsewhere

    def receives(self, worker: str, now: float) -> bool:
        """Whether a message has lately been arriving at a worker, as over a slow line."""
        known = self.workers.get(worker)
        return known is not None and now - known.received_at < self.rules.resend_s

    def advancing(self, worker: str) -> bool:
        """Whether a worker has advanced since the round was last opened, or its work has."""
        known = self.workers.get(worker)
        if known is None or worker in self.failed:
            return False
        since = known.moved_at if self.busy(worker) else known.received_at
        return since > self.opened_at

    def issued_before(self, worker: Worker, now: float) -> Issued | None:
        """Return the work that an earlier coordinator gave to a worker that still does it."""
        ticket = Ticket(worker.name, worker.sequence or worker.round)
        answered = ticket in self.received or self.has_counted(ticket)  # its report may be older
        if answered or worker.name in self.asked or not self.busy(worker.name):
            return None
        return Issued(now, ticket.sequence, worker.round)

    def _is_on_task(self, worker: Worker) -> bool:
        """Whether the work that a worker does, or did last, is the work that it was asked for.

        Not all workers report their ticket and the name of their weights.
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
