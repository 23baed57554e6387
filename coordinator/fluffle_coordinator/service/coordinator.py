"""The coordinator: the asyncio shell around the round machine.

Data flows one way::

    link ──deliveries──> events ──> advance() ──> effects ─┬─> outbox     (publishes, in order)
                           ^                              └─> aggregator (the sum, in order)
                           └───────────────────────────────────── committer (the disk, in order)

Only ``_post`` changes the state, one event after the other. Publishing, the sum and the disk have a
queue and a task each, so that neither a slow broker nor a slow disk keeps signs of life from being
heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import uuid
from collections import deque
from dataclasses import replace
from typing import Any

from fluffle_common.clock import monotonic
from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost, MalformedMessage, TaskError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.codec import SMALL_HEADER_BYTES, decode, describe, greeting
from fluffle_common.protocol.exchanges import Exchanges, Sent
from fluffle_common.protocol.messages import (
    PROTOCOL,
    Bye,
    Echo,
    Evaluation,
    Exchange,
    Failure,
    FirstWeights,
    Heartbeat,
    Hello,
    Message,
    Update,
)
from fluffle_common.protocol.model_form import model_form
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.base import (
    Delivery,
    Link,
    QueueFull,
    QueueInUse,
    Transport,
    UnknownQueueType,
    tell_of_blocking,
)
from fluffle_common.transport.messaging import Route, check_user, send
from fluffle_common.transport.reconnect import reconnecting
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import machine
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.observe.waiting import waiting_for
from fluffle_coordinator.observe.watchers import Watcher
from fluffle_coordinator.service.aggregator import Aggregator
from fluffle_coordinator.service.committer import Committer
from fluffle_coordinator.service.greetings import Greetings
from fluffle_coordinator.service.held_updates import Held, Room
from fluffle_coordinator.service.outbox import Outbox
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore, Saved

# How long the end of a run may wait for the journal to be on the broker.
_JOURNAL_DRAIN_S = 2.0
# How often the coordinator sends itself an echo: so it knows that it would hear a worker.
_ECHO_EVERY_S = 1.0
# How often, at most, what is due is looked for while much happens.
_LOOK_EVERY_S = 0.1


# What the machine knows of a worker by what it says of itself.
_OF_A_WORKER = {
    one.name for one in dataclasses.fields(rs.Worker)
} & Heartbeat.model_fields.keys() - {"model"}


class Coordinator:
    """One run of a federation.

    Args:
        settings: what the operator decided.
        transport: the way to the broker.
        topology: the names on it.
        store: the run's folder, locked.
        saved: what was found in it.
        watcher: who is told what happens.
        journal: one of those, which needs a link to publish what it is told; None keeps none.
        exchanges: who handles protocols in several phases.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        transport: Transport,
        topology: Topology,
        store: RunStore,
        saved: Saved,
        watcher: Watcher,
        journal: Journal | None = None,
        exchanges: Exchanges | None = None,
    ) -> None:
        self._settings, self._transport, self._topology = settings, transport, topology
        self._watcher, self._journal, self._folder = watcher, journal, store.folder
        self._exchanges = exchanges or Exchanges()
        self._events: deque[ev.Event] = deque()
        self._taking = False
        self._ended: asyncio.Future[None]
        self._deliveries: dict[rs.Handle, Held] = {}
        self._room, self._greetings = Room(settings.max_held_bytes), Greetings()
        self._link: Link | None = None
        self._linked = asyncio.Event()
        self._caught_up = asyncio.Event()
        self._session = uuid.uuid4().hex[:12]
        self._next_look: asyncio.TimerHandle
        self._look_at = 0.0  # when it is asked next what time has brought
        # What was last waited for, and when that is reported again.
        self._waits_for: tuple[str | None, ...] = ()
        self._say_at = monotonic() + settings.waiting_every_s
        self._waiting_since: tuple[object, ...] = ()
        self._task = saved.metadata.get("task", "")
        known = json.loads(saved.metadata.get("classes", "null"))
        self._outbox = Outbox(
            topology,
            saved.run,
            settings,
            link=lambda: self._link,
            a_link=self._a_link,
            record=self._record,
        )
        self._committer = Committer(
            store,
            metadata=self._metadata,
            record=self._record,
            post=self._post,
            strategy=settings.strategy.name,
            hooks=settings.hooks,
            stopping=settings.stopping,
            rounds=settings.rules.rounds,
        )
        self._aggregator = Aggregator(
            topology,
            saved.weights,
            self._committer,
            max_model_bytes=settings.max_model_bytes,
            link=lambda: self._link,
            post=self._post,
            strategy=settings.strategy,
            plan=settings.whole_plan,
            resumed=(saved.committed, saved.kept) if saved.committed else None,
            keep_updates=settings.keep_updates,
            verify_users=settings.verify_users,
            averaged=self._outbox.prepare,
            folder=store.folder,
            carries=settings.schedule.max_staleness > 0,
        )
        self.state = machine.start(
            settings.rules,
            saved.run,
            monotonic(),
            schedule=settings.schedule,
            committed=saved.committed,
            counted=saved.counted,
            sequence=saved.sequence,
            earlier=saved.earlier,
            asked_in=saved.asked_in,
            train_s=saved.train_s,
            announced=saved.announced,
            evaluated=saved.evaluated,
            has_weights=saved.weights is not None,
            base=saved.base,
            classes=settings.classes or (tuple(known) if known else None),
            model=None if saved.weights is None else model_form(saved.weights),
            decided_by="--classes" if settings.classes else "this run's first weights",
        )

    async def run(self) -> rs.State:
        """Run to the end; cancel it to stop earlier, which loses nothing that a restart needs."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._next_look = loop.call_later(0.0, self._look)
        tasks = [
            asyncio.create_task(work(), name=work.__name__)
            for work in (
                self._end,
                self._links,
                self._aggregator.run,
                self._committer.run,
                self._outbox.run,
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # but for the first, they run for ever: one that is done has failed
        except asyncio.CancelledError:
            if self.state.outcome is None:
                self._record(run_events.Interrupted(folder=str(self._folder)))
            raise
        except TaskError as wrong:  # so that the journal has it too
            self._record(run_events.Note(what=str(wrong)))
            raise
        finally:
            if self._journal is not None:
                await self._journal.drained(_JOURNAL_DRAIN_S)
            self._next_look.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self.state

    async def _end(self) -> None:
        """Wait for the end, and until all that was asked for is done."""
        await self._ended
        await self._aggregator.drained()
        await self._committer.drained()
        await self._outbox.drained()
        finished = self.state.outcome == "finished"
        kind = run_events.Finished if finished else run_events.Stopped
        self._record(kind(reason=self.state.reason))

    def exchange(self, sent: Sent) -> None:
        """Begin, or go on with, a protocol in several phases; a link that is lost may lose it.

        Raises:
            ValueError: see ``Sent.body``.
        """
        self._outbox.exchange(sent, sent.body())

    # --- the machine ---------------------------------------------------------------------------

    def _post(self, event: ev.Event) -> None:
        """Take an event and do what follows: now, or right after the event being taken now."""
        self._events.append(event)
        if self._taking:
            return
        self._taking, just_told = True, False
        try:
            while self._events:
                event = self._events.popleft()
                self.state, asked_for = machine.advance(self.state, event)
                for effect in asked_for:
                    self._perform(effect)
                just_told |= bool(asked_for)
            self._look_on(event.now, just_told=just_told)
        except Exception as wrong:  # whoever posts can do nothing about it: it ends the run
            if not self._ended.done():
                self._ended.set_exception(wrong)
        finally:
            self._taking = False

    def _look_on(self, now: float, *, just_told: bool) -> None:
        """Show where the run stands, and see to it that time is not forgotten."""
        phase = self.state.phase
        self._watcher.show(self.state, now)
        state = self.state
        waits_for = (phase is rs.Phase.WAITING, len(state.workers), state.init_asked, state.round)
        if waits_for != self._waiting_since or now >= self._say_at:
            self._waiting_since = waits_for
            self._say_what_is_waited_for(now, just_told=just_told)
        if phase is rs.Phase.ENDED and not self._ended.done():
            self._ended.set_result(None)
        if self._look_at > now + _LOOK_EVERY_S:
            self._look_in(_LOOK_EVERY_S)

    def _look(self) -> None:
        """Ask what time has brought; at many events, that is not asked at each of them."""
        self._post(ev.Tick(monotonic()))
        left_s = min(self._say_at, machine.wakeup(self.state)) - monotonic()
        self._look_in(left_s if left_s > 0 else _LOOK_EVERY_S)

    def _look_in(self, seconds: float) -> None:
        self._next_look.cancel()
        self._look_at = monotonic() + seconds
        self._next_look = asyncio.get_running_loop().call_later(seconds, self._look)

    def _say_what_is_waited_for(self, now: float, *, just_told: bool) -> None:
        state = self.state
        waiting = waiting_for(state, now) if state.phase is rs.Phase.WAITING else None
        kind: tuple[str | None, ...] = ()
        if waiting is not None:
            kind = waiting.what, state.init_asked if waiting.what == "first_weights" else None
        if kind == self._waits_for and now < self._say_at:
            return
        waiting = waiting or waiting_for(state, now)
        if waiting is not None:
            if just_told and now < self._say_at:
                return  # what was told just now says more; this, when nothing else happens
            self._record(waiting)
        self._say_at, self._waits_for = now + self._settings.waiting_every_s, kind

    def _perform(self, effect: fx.Effect) -> None:
        match effect:  # what comes often is first
            case fx.Record(event):
                self._record(event)
            case fx.Fold(handle):
                self._aggregator.fold(self._deliveries[handle], effect, self.state.round)
            case fx.Ack(handle):
                done = self._deliveries.pop(handle, None)
                if done is not None:
                    done.delivery.ack()
                    done.free()
                    self._aggregator.let_go(done)
            case fx.Opened():
                self._aggregator.opened()
            case fx.Reject(handle, reason, cause):
                done = self._deliveries.pop(handle, None)
                if done is not None:
                    self._reject(done.delivery, MalformedMessage(reason, cause), done.message)
                    done.free()
            case fx.Commit(number, asked):
                self._aggregator.commit(number, asked)
            case fx.RecordEvaluation(number, evaluations):
                self._committer.record_evaluation(number, evaluations)
            case fx.End(outcome, reason):
                self._committer.record_end(self.state.committed, outcome, reason)
                self._outbox.perform(effect, self.state, None)
            case _:
                self._outbox.perform(
                    effect, self.state, self._aggregator.weights, self._aggregator.broadcast
                )

    def _record(self, event: run_events.RunEvent) -> None:
        self._committer.counts.note(event)
        if isinstance(event, run_events.OfTheBroker):
            event = replace(event, address=self._transport.address)
        self._watcher.record(event)

    def _metadata(self, number: int) -> dict[str, str]:
        return {
            "federation": self._settings.federation,
            "run": self.state.run,
            "round": str(number),
            "task": self._task,
            "classes": json.dumps(list(self.state.classes or ())),
        }

    # --- what comes in -------------------------------------------------------------------------

    async def _links(self) -> None:
        def no_broker(reason: str, pause_s: float) -> None:
            self._record(run_events.NoBroker(reason=reason, pause_s=pause_s))

        opened = reconnecting(self._transport, self._settings.backoff, no_broker)
        number = 0
        async with contextlib.aclosing(opened):
            async for link in opened:
                number += 1
                try:
                    await self._serve(link, number)
                except QueueInUse:
                    what = f"federation {self._settings.federation} on this broker"
                    self._record(run_events.Standby(what=what))
                except LinkLost as gone:
                    self._record(run_events.Disconnected(reason=str(gone)))
                finally:
                    self._link = None
                    self._linked.clear()
                    self._room.link_lost()
                    self._post(ev.Disconnected(monotonic()))

    async def _serve(self, link: Link, number: int) -> None:
        journal = self._topology.journal_stream()
        await link.declare([one for one in self._topology.shared() if one != journal])
        await self._declare(journal, link)
        # Whoever reads the signs of life, alone, is the federation's coordinator.
        presence = await link.consume(self._topology.presence, prefetch=100, exclusive=True)
        self._link = link
        self._linked.set()
        self._caught_up.clear()
        self._post(ev.Connected(monotonic(), number))
        works = [
            self._read_presence(presence),
            self._send_echoes(link, number),
            self._consume_updates(link, number),
            tell_of_blocking(link, self._record),
        ]
        await run_all(*works, *([self._journal.publish(link)] if self._journal else []))

    async def _declare(self, journal: Queue, link: Link) -> None:
        """Make sure that there is a journal; without one, the run goes on all the same."""
        if self._journal is not None:
            try:
                await link.declare([journal])
            except UnknownQueueType as no:
                self._journal = None
                self._record(run_events.NoJournal(reason=str(no)))

    async def _a_link(self) -> Link:
        while self._link is None:
            await self._linked.wait()
        return self._link

    async def _send_echoes(self, link: Link, number: int) -> None:
        """Send echoes to ourselves, the way that signs of life come; see ``hearing``."""
        echo = Echo(federation=self._settings.federation, session=self._session, number=number)
        route = Route("", [self._topology.presence], durable=False, urgent=True)
        while True:
            with contextlib.suppress(QueueFull):
                await send(link, echo, route)
            await asyncio.sleep(min(_ECHO_EVERY_S, self.state.hearing_s / 2))

    async def _consume_updates(self, link: Link, number: int) -> None:
        # First, who is here is heard: what an update may weigh depends on it.
        await self._caught_up.wait()
        prefetch = self._settings.max_workers + 100
        updates = await link.consume(self._topology.updates, prefetch=prefetch)
        await self._read_updates(updates, number)

    async def _read_presence(self, deliveries: Any) -> None:
        message: Message | None
        async for delivery in deliveries:
            try:
                message, _ = decode(
                    delivery.body, self._settings.federation, max_header=SMALL_HEADER_BYTES
                )
                self._check_sender(message, delivery)
                if isinstance(message, Hello | Heartbeat):
                    message = self._greetings.admit(message, monotonic())
                if message is not None:
                    self._presence(message)
            except MalformedMessage as wrong:
                self._reject(delivery, wrong)
                if wrong.cause == "malformed":
                    self._refuse_hello(delivery, wrong)
            else:
                delivery.ack()

    def _refuse_hello(self, delivery: Delivery, wrong: MalformedMessage) -> None:
        """Answer a hello that could not be taken, perhaps one of another version."""
        hello = greeting(delivery.body, self._settings.federation)
        if hello is None or self._outbox.was_refused(hello):
            return
        if self._settings.verify_users:
            try:
                check_user(hello.worker, delivery)
            except MalformedMessage:
                return
        if hello.protocol == PROTOCOL:
            code, reason = "malformed", f"the hello of worker {hello.worker} is malformed: {wrong}"
        else:
            code, reason = (
                "protocol",
                (
                    f"worker {hello.worker} speaks protocol {hello.protocol}, but this "
                    f"coordinator speaks protocol {PROTOCOL}; install the same version of "
                    "fluffle on both sides"
                ),
            )
        self._record(run_events.Refused(worker=hello.worker, reason=reason))
        self._outbox.bind(hello.worker, hello.session, again=True)
        self._outbox.refuse(hello, reason, code)

    def _presence(self, message: Any) -> None:
        now = monotonic()
        match message:
            case Hello() | Heartbeat():
                self._outbox.bind(message.worker, message.session, again=isinstance(message, Hello))
                self._task = self._task or message.task
                worker = rs.Worker(
                    name=message.worker,
                    last_seen=now,
                    model=message.model,
                    **message.model_dump(include=_OF_A_WORKER),
                )
                self._post(ev.Seen(now, worker, isinstance(message, Hello)))
            case Echo(session=session, number=link):
                if session == self._session:  # else of one that had this queue before
                    self._post(ev.Echoed(now, link))
                    if link == self.state.link:
                        self._caught_up.set()
            case Bye(worker=worker_name, session=session, reason=reason):
                self._post(ev.Left(now, worker_name, session, reason))
            case Failure(worker=worker_name, run=run, round=number, reason=reason):
                self._post(ev.Failed(now, worker_name, run, number, reason))
            case _:
                raise MalformedMessage(
                    f"a message of kind {message.kind} is no sign of life", "kind"
                )

    async def _read_updates(self, deliveries: Any, link: int) -> None:
        number = 0
        async for delivery in deliveries:
            number += 1
            if self._room.park(delivery):
                continue
            try:
                message, payload = decode(
                    delivery.body,
                    self._settings.federation,
                    max_header=self._aggregator.max_header,
                )
                self._check_sender(message, delivery)
                self._update(message, payload, delivery, rs.Handle(link, number))
            except MalformedMessage as wrong:
                self._reject(delivery, wrong)

    def _check_sender(self, message: Any, delivery: Delivery) -> None:
        """Compare who a message says it is of with who the broker says has sent it."""
        worker = getattr(message, "worker", None)
        if self._settings.verify_users and worker is not None:
            check_user(worker, delivery)

    def _update(
        self, message: Any, payload: memoryview, delivery: Delivery, handle: rs.Handle
    ) -> None:
        now = monotonic()
        match message:
            case Update():
                self._deliveries[handle] = Held(delivery, message, payload, self._room)
                ticket = rs.Ticket(message.worker, message.sequence or message.round)
                about = message.run, message.round, ticket, message.num_examples
                self._post(ev.Arrived(now, handle, *about, message.base))
            case Evaluation():
                found = rs.Evaluated(message.num_examples, message.loss, message.metrics)
                of = (message.run, message.round, message.worker)
                self._post(ev.EvaluationArrived(now, *of, found, message.base))
                delivery.ack()
            case FirstWeights() if message.run == self.state.run:
                self._first_weights(Held(delivery, message, payload, self._room), message.worker)
            case Exchange(worker=str()) if message.run == self.state.run:
                for sent, body in self._exchanges.receive(message, payload):
                    self._outbox.exchange(sent, body)
                delivery.ack()
            case FirstWeights() | Exchange(worker=str()):
                raise MalformedMessage(
                    f"it belongs to run {message.run}; this coordinator runs {self.state.run}",
                    "run",
                )
            case _:
                raise MalformedMessage(f"a message of kind {message.kind} is no update", "kind")

    def _first_weights(self, held: Held, worker: str) -> None:
        """Take the first weights from the worker that was asked, and from no other."""
        if self.state.has_weights or self.state.init_asked is None:
            held.delivery.ack()  # nobody is asked now; whoever will be sends them again
        elif worker == self.state.init_asked:
            self._aggregator.take_first(held)
        else:
            raise MalformedMessage(
                f"first weights were requested from {self.state.init_asked}, not from {worker}",
                "sender",
            )

    def _reject(
        self, delivery: Delivery, wrong: MalformedMessage, message: Message | None = None
    ) -> None:
        about = {"kind": message.kind, **describe(message)} if message else {}
        details = {"reason": str(wrong), "cause": wrong.cause, **about}
        self._record(run_events.from_fields("rejected", details))
        self._outbox.reject(delivery, wrong)
