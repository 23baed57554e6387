"""A model of a federation: both real machines, with models of everything around them.

The coordinator and the workers decide with their real ``machine.advance``. The broker, the disk and
the two shells are models that carry out one effect per step, so a test can stop, crash or
disconnect anything between any two effects. The model asserts its invariants as it runs.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import machine as rounds
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.machine.state import Handle, Phase, Rules, Ticket
from fluffle_worker import machine as session

RUN = "run-a"
HEARTBEAT_S = 2.0
NUM_EXAMPLES = 10
# A worker that was heard within this time must not be gone: five heartbeats, less the time for
# which the clock runs on in silence.
SILENCE_S = 5 * HEARTBEAT_S - Rules(rounds=1).hearing_s
Flaw = Literal["", "bad", "torn"]  # none, rejected tensors, incomplete tensors


class Identity(NamedTuple):
    """The identity of an update, and the weights that it was trained from."""

    run: str
    round: int
    worker: str
    base: str
    sequence: int = 0  # 0 if the worker sends no tickets

    @property
    def ticket(self) -> Ticket:
        return Ticket(self.worker, self.sequence or self.round)


@dataclass(eq=False)
class Message:
    """A message in the queue of updates; copies are separate messages."""

    kind: Literal["update", "evaluation", "init"]
    identity: Identity
    flaw: Flaw = ""
    fate: Literal["", "acked", "rejected"] = ""


class Order(NamedTuple):
    """A message in a worker's inbox."""

    kind: Literal["init", "fit", "evaluate", "stop"]
    run: str
    round: int
    base: str = ""
    evaluate: bool = False
    attempt: int = 0
    sequence: int = 0
    frozen: str = ""  # the digest of the frozen tensors that the work needs
    brings: bool = False  # them


class Broker:
    """Queues that outlive all processes, and redeliver messages that are not acknowledged."""

    def __init__(self) -> None:
        self.updates: deque[Message] = deque()
        self.unacked: dict[Handle, Message] = {}
        self.presence: deque[ev.Event] = deque()
        self.inboxes: dict[str, deque[Order]] = {}
        self.published: list[Message] = []
        self.links = 0  # of all coordinators so far
        self.deliveries = 0

    def publish(self, message: Message) -> None:
        self.updates.append(message)
        self.published.append(message)

    def deliver(self, link: int) -> tuple[Handle, Message]:
        self.deliveries += 1
        handle = Handle(link, self.deliveries)
        message = self.unacked[handle] = self.updates.popleft()
        return handle, message

    def settle(self, handle: Handle, fate: Literal["acked", "rejected"]) -> None:
        message = self.unacked.pop(handle, None)
        if message is not None:  # else the handle is void: it is from an earlier link
            message.fate = fate

    def take_back(self) -> None:
        """Put unacknowledged messages back in their places: their consumer is gone."""
        self.updates.extendleft(reversed(self.unacked.values()))
        self.unacked.clear()


@dataclass
class Disk:
    first_weights: bool
    checkpoint: int = 0
    history: list[frozenset[str]] = field(default_factory=list)  # each round's participants
    counted: list[frozenset[Ticket]] = field(default_factory=list)  # each round's tickets
    bases: list[str] = field(default_factory=list)  # of the first weights and of each round
    evaluated: set[int] = field(default_factory=set)
    starts: int = 0  # of coordinators


class CoordinatorModel:
    """A model of the coordinator's shell, which works step by step."""

    def __init__(self, world: World) -> None:
        disk = world.disk
        self.world, self.broker, self.disk = world, world.broker, disk
        self.link = 0
        self.read_until = 0.0  # when the last presence message that was read had been sent
        self.events: deque[ev.Event] = deque()
        self.jobs: deque[tuple[Any, ...]] = deque()  # for the aggregator
        self.lines: deque[tuple[Any, ...]] = deque()  # for the committer
        self.out: deque[tuple[Any, ...]] = deque()
        self.deliveries: dict[Handle, Message] = {}
        self.sum: set[Ticket] = set()
        self.averaged_tickets = {ticket for some in disk.counted for ticket in some}
        self.closing = False
        self.forgotten: set[Handle] = set()
        last = len(disk.history)
        self.averaged = last
        # The base of each round, as far as this process knows.
        self.issued = {number + 1: base for number, base in enumerate(disk.bases)}
        counted = dict(enumerate(disk.counted, start=1))
        self.state = world.machine.start(
            world.rules,
            RUN,
            world.now,
            schedule=world.schedule,
            committed=last,
            counted=counted,
            announced=rs.Table({t.worker: NUM_EXAMPLES for of in disk.counted for t in of}),
            earlier_starts=disk.starts,
            earlier=self.issued,
            evaluated=not last or last in disk.evaluated,
            has_weights=disk.first_weights,
            base=disk.bases[-1] if disk.bases else "",
            frozen=world.frozen if disk.first_weights else "",
        )
        disk.starts += 1

    # --- the link ---

    def connect(self) -> None:
        if not self.link:
            self.broker.links += 1
            self.link = self.broker.links
            self.events.append(ev.Connected(self.world.now, self.link))
            self.echo()

    def echo(self) -> None:
        """Send an echo to itself through the presence queue."""
        if self.link:
            self.broker.presence.append(ev.Echoed(self.world.now, self.link))

    def lose_link(self) -> None:
        if self.link:
            self.link = 0
            self.broker.take_back()
            self.events.append(ev.Disconnected(self.world.now))

    # --- steps: each returns whether there was anything to do ---

    def read_update(self) -> bool:
        if not self.link or not self.state.caught_up or not self.broker.updates:
            return False
        handle, message = self.broker.deliver(self.link)
        now, (run, number, worker, base, _) = self.world.now, message.identity
        ticket = message.identity.ticket
        match message.kind:
            case "update":
                self.deliveries[handle] = message
                about = ticket, number, base, NUM_EXAMPLES
                self.events.append(ev.Arrived(now, run, handle, *about, 1.0, 100))
            case "evaluation":
                evaluated = rs.Evaluated(10, 0.5, {})
                self.events.append(ev.EvaluationArrived(now, run, number, worker, evaluated, base))
                self.broker.settle(handle, "acked")
            case "init":
                asked = worker == self.state.init_asked
                self.jobs.append(("first" if asked else "unasked", handle))
        return True

    def read_presence(self) -> bool:
        if not self.link or not self.broker.presence:
            return False
        event = self.broker.presence.popleft()
        self.read_until = event.now
        event = replace(event, now=self.world.now)
        if isinstance(event, ev.Seen):
            event = replace(event, worker=replace(event.worker, last_seen=self.world.now))
            self.world.workers[event.worker.name].unheard = False
        self.events.append(event)
        return True

    def take_event(self) -> bool:
        if not self.events:
            return self.tick() if self.world.machine.wakeup(self.state) <= self.world.now else False
        self._advance(self.events.popleft())
        return True

    def tick(self) -> bool:
        self._advance(ev.Tick(self.world.now))
        assert self.world.machine.wakeup(self.state) > self.world.now, "the shell would spin"
        return True

    def _advance(self, event: ev.Event) -> None:
        before = self.state.phase
        self.state, effects = self.world.machine.advance(self.state, event)
        for effect in effects:
            self._perform(effect)
        if before is not Phase.ENDED and self.state.phase is Phase.ENDED:
            assert sum(isinstance(effect, fx.End) for effect in effects) == 1

    def _perform(self, effect: fx.Effect | run_events.RunEvent) -> None:
        number = self.state.round
        match effect:
            case fx.Forget(handle):
                self.forgotten.add(handle)
            case fx.Fold(update):
                assert update.handle not in self.forgotten
                assert update.num_examples == NUM_EXAMPLES
                self.jobs.append(("fold", self.deliveries[update.handle]))
            case fx.Commit(committed):
                self.closing = True
                self.jobs.append(("commit", committed))
            case fx.RecordEvaluation(evaluated):
                self.lines.append(("evaluated", evaluated))
            case run_events.Gone(worker=str(name)) as gone:
                worker = self.world.workers[name]
                recent = [at for at in worker.spoke if 0 <= self.read_until - at < SILENCE_S]
                assert worker.unheard or not recent, f"{gone}, and it spoke at {recent}"
            case fx.Ack(handle):
                self.out.append(("settle", handle, "acked"))
            case fx.Reject(handle, reason, _):
                assert reason
                self.out.append(("settle", handle, "rejected"))
            case fx.AskInit(worker):
                self.out.append(("send", (worker,), Order("init", RUN, 0)))
            case fx.SendFit(workers, evaluate, sequence, attempt, brings):
                order = Order("fit", RUN, number, self.state.base, evaluate, attempt, sequence)
                order = order._replace(frozen=self.state.frozen, brings=brings)
                self.world.check_tickets(workers, order)
                self.out.append(("send", workers, order))
            case fx.SendEvaluate(workers, brings):
                order = Order("evaluate", RUN, number - 1, self.state.base)
                order = order._replace(frozen=self.state.frozen, brings=brings)
                self.out.append(("send", workers, order))
            case fx.End(_, reason, workers):
                assert reason
                self.out.append(("send", workers, Order("stop", RUN, number)))

    def send_one(self) -> bool:
        if not self.out:
            return False
        match self.out.popleft():
            case _ if not self.link:
                pass  # the machine sends it again over the next link
            case "settle", handle, fate:
                self.broker.settle(handle, fate)
            case "send", workers, order:
                for name in workers:
                    self.broker.inboxes[name].append(order)
        return True

    def aggregate_one(self) -> bool:
        if not self.jobs:
            return False
        disk, now = self.disk, self.world.now
        match self.jobs.popleft():
            case "fold", message:
                if not self.closing:
                    self.jobs.appendleft(("folding", message))
            case "folding", message:
                self._fold(message)
            case "commit", number:
                assert number == self.averaged + 1
                done = number, frozenset(self.sum), self.world.new_base()
                self.averaged_tickets |= self.sum
                self.averaged, self.issued[number + 1] = number, done[2]
                self.sum, self.closing = set(), False
                self.lines.append(("checkpoint", *done))
            case "first", handle:
                if not disk.first_weights:
                    base = self.issued[1] = self.world.new_base()
                    disk.first_weights, disk.bases = True, [base]
                    self.events.append(ev.WeightsReady(now, base, self.world.frozen))
                self.broker.settle(handle, "acked")
            case "unasked", handle:
                self.broker.settle(handle, "acked")
        return True

    def write_one(self) -> bool:
        if not self.lines:
            return False
        disk = self.disk
        match self.lines.popleft():
            case "checkpoint", *done:
                disk.checkpoint = done[0]
                self.lines.appendleft(("line", *done))
            case "line", number, tickets, base:
                self.world.check_commit(number, tickets)
                disk.history.append(frozenset(ticket.worker for ticket in tickets))
                disk.counted.append(tickets)
                disk.bases.append(base)
                self.events.append(ev.Committed(self.world.now, number, base))
            case "evaluated", number:
                assert number not in disk.evaluated, f"round {number} was evaluated twice"
                assert number <= len(disk.history), f"round {number} is evaluated ahead of its line"
                disk.evaluated.add(number)
        return True

    def _fold(self, message: Message) -> None:
        identity, now = message.identity, self.world.now
        ticket = identity.ticket
        if message.flaw:
            torn = message.flaw == "torn"
            self.events.append(ev.FoldFailed(now, ticket, "it is " + message.flaw, again=torn))
            return
        number = self.averaged + 1
        fold = f"{identity} folded into round {number}"
        assert identity.run == RUN, fold
        assert identity.base == self.issued.get(identity.round), fold
        assert 0 <= number - identity.round <= self.world.schedule.max_staleness, fold
        assert ticket not in self.sum | self.averaged_tickets, f"{identity} folded twice"
        self.sum.add(ticket)
        self.events.append(ev.Folded(now, ticket))

    def break_off_fold(self) -> bool:
        """Lose the link while the parts of an update are being fetched."""
        if not self.jobs or self.jobs[0][0] != "folding":
            return False
        _, message = self.jobs.popleft()
        self.lose_link()
        ticket = message.identity.ticket
        self.events.append(
            ev.FoldFailed(self.world.now, ticket, "the connection was closed", again=True)
        )
        return True

    def knows(self, handle: Handle) -> bool:
        """Whether a delivery is held or about to be settled."""
        held = {update.handle for update in self.state.received.values()}
        held |= {copy.handle for copies in self.state.spares.values() for copy in copies}
        arriving = {event.handle for event in self.events if isinstance(event, ev.Arrived)}
        jobs = {job[1] for job in (*self.jobs, *self.out) if isinstance(job[1], Handle)}
        return handle in held | arriving | jobs


class WorkerModel:
    """A model of a worker's shell: its inbox, thread, answers and heartbeats."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.broker, self.name = world, world.broker, name
        self.sessions = 0
        self.alive = False
        self.slow = False  # it finishes only when a move says so
        self.kept, self.keeps = "", name in "ab"  # the frozen tensors that outlive the process
        self.spoke: list[float] = []  # when it sent hellos and heartbeats
        self.unheard = False  # its last heartbeats were lost
        self.broker.inboxes[name] = deque()

    @property
    def inbox(self) -> deque[Order]:
        return self.broker.inboxes[self.name]

    def begin(self) -> None:
        """Start the process."""
        if not self.alive:
            self.sessions += 1
            self.alive, self.linked = True, False
            self.state = self.world.session.State()
            self.evaluates: dict[session.Work, bool] = {}
            self.unsent: deque[session.Work] = deque()
            self.thread: session.Work | None = None
            self.wanted = True
            self.sent: session.Work | None = None
            self.report: dict[str, Any] = {"state": "idle", "run": None, "round": 0}
            self.frozen = self.kept
            self.inbox.clear()
            self.connect()

    def crash(self) -> None:
        self.alive = False

    def leave(self) -> None:
        if self.alive:
            if self.linked:
                gone = ev.Left(self.world.now, self.name, self._session, "it is late")
                self.broker.presence.append(gone)
            self.alive = False

    def connect(self) -> None:
        if self.alive and not self.linked:
            self.linked = True
            self._speak(hello=True)

    def lose_link(self) -> None:
        self.linked = False
        if self.inbox and self.inbox[0].brings:
            self.inbox.popleft()  # some of its parts were read already

    def heartbeat(self) -> None:
        if self.alive and self.linked:
            self._speak(hello=False)

    @property
    def _session(self) -> str:
        return f"{self.name}-{self.sessions}"

    def _speak(self, *, hello: bool) -> None:
        self.spoke.append(self.world.now)
        fields = {
            **self.report,
            "features": ("frozen",),
            "frozen": (self.frozen,) if self.frozen else (),
        }
        worker = rs.Worker(self.name, self._session, NUM_EXAMPLES, (), HEARTBEAT_S, 0.0, **fields)
        self.broker.presence.append(ev.Seen(self.world.now, worker, hello))

    def read(self) -> bool:
        if not self.alive or not self.linked or not self.inbox:
            return False
        order = self.inbox.popleft()
        if order.kind == "stop":
            self._advance(self.world.session.Stopped("the run has ended"))
            return True
        work = self.world.session.Work(*order[:4], order.attempt, order.sequence)
        if order.brings:
            assert order.frozen
            self.frozen = order.frozen
            if self.keeps:
                self.kept = order.frozen
        if order.frozen != self.frozen and order.frozen:
            self._now("receiving", work)  # it passes work over that it cannot do
            return True
        self.evaluates.setdefault(work, order.evaluate or order.kind == "evaluate")
        self._advance(self.world.session.Asked(work))
        state = self.state
        if work not in (state.doing, state.next, state.sending, state.answered):
            del self.evaluates[work]
        return True

    def finish(self, how: Literal["finished", "failed"] = "finished") -> bool:
        """Let the thread finish, or stop if its work was abandoned."""
        if not self.alive or self.thread is None:
            return False
        work, self.thread = self.thread, None
        if how == "failed":
            self._advance(self.world.session.Failed(work, "out of memory"))
        elif self.wanted:
            self._advance(self.world.session.Finished(work))
        else:
            self._advance(self.world.session.Abandoned(work))
        return True

    def work(self) -> bool:
        return not self.slow and self.finish()

    def finish_unwanted(self) -> bool:
        """Let the thread finish before it notices that its work was abandoned."""
        self.wanted = True
        return self.finish()

    def send(self, *, flaw: Flaw = "", confirmed: bool = True) -> bool:
        """Send an answer; if it is not confirmed, lose the link and keep the answer."""
        if not self.alive or not self.linked or not self.unsent:
            return False
        work = self.unsent[0]
        if work in self.evaluates and self.state.sending == work:
            self._publish(work, flaw, confirmed=confirmed)
            if not confirmed:
                self.linked = False
                return True
            self._advance(self.world.session.Sent(work))
            self.sent = work
            self.report["state"] = "idle"
        self.unsent.popleft()
        return True

    def _publish(self, work: session.Work, flaw: Flaw, *, confirmed: bool) -> None:
        number = work.round - 1 if work.kind == "fit" else work.round
        if self.evaluates[work]:
            evaluated = Identity(work.run, number, self.name, work.base)
            self.broker.publish(Message("evaluation", evaluated))
        if work.kind == "init":
            self.broker.publish(Message("init", Identity(work.run, 0, self.name, "")))
        elif work.kind == "fit":
            identity = Identity(work.run, work.round, self.name, work.base, work.sequence)
            self.broker.publish(Message("update", identity, flaw))
            if confirmed and not flaw:
                self.world.confirmed.add(identity)

    def _advance(self, event: session.Event) -> None:
        before, module = self.state, self.world.session
        self.state, effects = module.advance(self.state, event)
        self._check_order(before)
        for effect in effects:
            work = getattr(effect, "work", None)
            if isinstance(effect, module.Begin):
                assert self.thread is None, "two works at once"
                assert work != self.sent, "an answered work is done again"
                self.thread, self.wanted, self.sent = work, True, None
                self._now("training" if work.kind == "fit" else "evaluating", work)
            elif isinstance(effect, module.Abandon):
                assert work == self.thread
                self.wanted = False
            elif isinstance(effect, module.Send):
                assert self.unsent.count(work) <= 1, "answered twice"
                self.unsent.append(work)
                self._now("sending", work)
            elif isinstance(effect, module.Drop):
                del self.evaluates[work]
            elif isinstance(effect, module.Report):
                self._now("idle", work)
                if self.linked:
                    now, reason = self.world.now, effect.reason
                    failure = ev.Failed(now, self.name, work.run, work.round, reason)
                    self.broker.presence.append(failure)
            elif isinstance(effect, module.Leave):
                self.leave()
        held = {self.state.doing, self.state.next, self.state.sending, self.state.answered}
        held.add(getattr(event, "work", None))
        assert not self.alive or self.evaluates.keys() <= held, "a work is leaked"

    def _now(self, state: str, work: session.Work) -> None:
        self.report = {"state": state, "run": work.run, "round": work.round, "base": work.base}
        self.report["sequence"] = work.sequence or None

    def _check_order(self, before: session.State) -> None:
        """Check that no work was replaced by older work of the same run."""
        for was in (before.doing, before.next, before.sending):
            for now in (self.state.doing, self.state.next):
                if was is not None and now is not None and was.run == now.run:
                    assert now == before.doing or now.round >= was.round, f"{was} before {now}"


class World:
    """A federation and its invariants."""

    def __init__(
        self,
        rules: Rules,
        names: str,
        *,
        first_weights: bool,
        schedule: Schedule[rs.State] = QUORUM,
        frozen: str = "",
        machine: ModuleType = rounds,
        worker_machine: ModuleType = session,
    ) -> None:
        self.rules, self.machine, self.session = rules, machine, worker_machine
        self.schedule, self.frozen = schedule, frozen
        self.now = 100.0
        self.broker = Broker()
        self.bases = 0
        self.disk = Disk(first_weights, bases=[self.new_base()] if first_weights else [])
        self.in_parts = False  # whether updates are too large for one message
        self.confirmed: set[Identity] = set()  # updates whose sender has a confirmation
        self.tickets: dict[tuple[str, int], str] = {}  # the base of each
        self.workers = {name: WorkerModel(self, name) for name in names}
        self.coordinator: CoordinatorModel | None = None

    def new_base(self) -> str:
        self.bases += 1
        return f"b{self.bases}"

    # --- moves ---

    def start_coordinator(self) -> None:
        if self.coordinator is None:
            self.coordinator = CoordinatorModel(self)

    def crash_coordinator(self) -> None:
        if self.coordinator is not None:
            self.broker.take_back()
            self.coordinator = None

    def run(self, steps: float = math.inf) -> bool:
        """Let everyone work in turns; return True once all are waiting, False after ``steps``."""
        done = 0
        while done < steps:
            before = done
            for step in self._steps():
                done += step()
            self.check()
            if done == before:
                return True
            assert done < 10_000, "it never comes to rest"
        return False

    def _steps(self) -> list[Any]:
        coordinator, steps = self.coordinator, []
        if coordinator is not None:
            steps = [
                coordinator.read_presence,
                coordinator.read_update,
                coordinator.take_event,
                coordinator.aggregate_one,
                coordinator.write_one,
                coordinator.send_one,
            ]
        for worker in self.workers.values():
            steps += [worker.read, worker.work, worker.send]
        return steps

    def beat(self) -> None:
        """Advance the clock to the next heartbeats."""
        self.now += HEARTBEAT_S
        for worker in self.workers.values():
            worker.heartbeat()
        if self.coordinator is not None:
            self.coordinator.echo()

    def settle(self, *, afresh: bool = False) -> None:
        """End all faults and let time pass; check that this alone ends the run.

        If enough workers are alive, a coordinator that starts ``afresh`` must finish the run, with
        two exceptions: an earlier one has ended it and a stop is still in an inbox, or the rules
        stop a round in which only some workers were asked and these do not answer.
        """
        if afresh:
            self.crash_coordinator()
        ended = any(
            order.kind == "stop" for worker in self.workers.values() for order in worker.inbox
        )
        self.start_coordinator()
        assert self.coordinator is not None
        self.coordinator.connect()
        for worker in self.workers.values():
            worker.connect()
            worker.slow = False
        number = self.rules.quorum.number
        living = sum(worker.alive for worker in self.workers.values())
        enough = living >= max(self.rules.min_workers, self.rules.least, number or 1)
        enough &= living >= self.rules.fewest_present
        enough |= self.schedule.continuous and living >= self.rules.min_workers and not ended
        enough &= self.rules.fraction == 1.0 or number is None
        enough &= self.rules.fraction == 1.0 or self.rules.on_deadline != "stop"
        enough &= not ended
        latest = self.now + 3000
        while self.coordinator.state.phase is not Phase.ENDED:
            self.run()
            assert self.now < latest, f"the run does not end: {self.coordinator.state}"
            self.beat()
        self.run()
        state = self.coordinator.state
        assert state.reason
        if state.outcome == "finished":
            assert len(self.disk.history) == self.rules.rounds
        else:  # a declared stop: forged copies of all updates may have come first
            assert not (afresh and enough) or state.reason.startswith("every worker failed"), state

    # --- invariants ---

    def check_tickets(self, workers: tuple[str, ...], order: Order) -> None:
        """Check that work from different weights has different tickets."""
        for name in workers:
            known = self.tickets.setdefault((name, order.sequence), order.base)
            assert not self.schedule.continuous or known == order.base, f"{order} has an old ticket"

    def check_commit(self, number: int, participants: frozenset[Ticket]) -> None:
        assert number == len(self.disk.history) + 1, f"round {number} is committed out of order"
        assert self.disk.checkpoint == number
        wanted, strict = self.rules.quorum.number, self.rules.on_deadline != "close"
        if isinstance(self.schedule, Buffered):
            wanted = self.schedule.buffer
        if wanted is not None and strict:
            assert len(participants) >= wanted, f"round {number} is committed below its quorum"
        assert participants

    def check(self) -> None:
        """Check the invariants of every step."""
        coordinator = self.coordinator
        if coordinator is not None:
            state = coordinator.state
            closing = [
                one
                for one in state.received.values()
                if self.schedule.continuous or one.round == state.round
            ]
            assert state.folded == sum(one.ticket in state.norms for one in closing)
            assert {*state.norms} | {*state.spares} <= {*state.received}
            assert state.tally == state.replace_and_recount().tally
        if coordinator is not None and coordinator.state.phase is not Phase.ENDED:
            for handle, message in self.broker.unacked.items():
                assert coordinator.knows(handle), f"{message} is forgotten"
        open_round = len(self.disk.history) + 1
        alive = {id(m) for m in (*self.broker.updates, *self.broker.unacked.values())}
        for message in self.broker.published:
            assert bool(message.fate) != (id(message) in alive), f"{message} has two ends or none"
        safe = {
            (message.identity.ticket, message.identity.base)
            for message in (*self.broker.updates, *self.broker.unacked.values())
            if message.kind == "update" and not message.flaw
        }
        valid = {**(coordinator.issued if coordinator is not None else {})}
        if self.disk.bases:
            valid[open_round] = self.disk.bases[-1]
        counted = {ticket for some in self.disk.counted for ticket in some}
        for identity in self.confirmed:
            if (identity.ticket, identity.base) in safe:
                continue
            too_old = identity.round < open_round - self.schedule.max_staleness
            if open_round <= self.rules.rounds and not too_old and identity.ticket not in counted:
                taken_back = identity.base != valid.get(identity.round)
                assert taken_back, f"{identity} was confirmed, and is lost"
