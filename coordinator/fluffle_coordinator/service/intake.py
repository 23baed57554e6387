"""The intake: decodes and checks what workers send, and turns it into events of the machine.

Signs of life and updates arrive in two queues. An invalid message is put into the rejected queue
with the reason and never reaches the machine. An update is held, unacknowledged and under a handle,
until the machine acknowledges or rejects it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import Callable
from typing import Any

from fluffle_common.clock import monotonic
from fluffle_common.errors import Cause, MalformedMessage
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol import messages as msg
from fluffle_common.protocol.exchanges import Handlers, handle_exchange
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import SMALL_HEADER_BYTES, decode, describe, minimal_hello
from fluffle_common.transport.base import Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, check_user, send
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.aggregator import Aggregator
from fluffle_coordinator.service.held_updates import Held, Room
from fluffle_coordinator.service.hello_limiter import HelloLimiter
from fluffle_coordinator.service.outbox import Outbox
from fluffle_coordinator.service.settings import CoordinatorSettings

_MAX_HELD_BYTES = 2**30  # of updates in memory that wait to be folded; see ``held_updates``
# How often the coordinator sends itself an echo, which proves that it would hear a worker.
_ECHO_EVERY_S = 1.0
# The machine's clock stops after a silence of a few heartbeats (``machine.clock``). If they were
# shorter, every echo would come too late, and no deadline would ever pass.
_LEAST_HEARTBEAT_S = 0.2
# The fields of a heartbeat that the machine keeps as they are.
_WORKER_FIELDS = {
    field.name for field in dataclasses.fields(rs.Worker)
} & msg.Heartbeat.model_fields.keys() - {"model", "heartbeat_s"}


class Intake:
    """Receives the messages of a run's workers.

    ``task`` is the name of the run's task; if empty, the first worker names it.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        topology: Topology,
        *,
        task: str,
        exchanges: Handlers,
        aggregator: Aggregator,
        outbox: Outbox,
        state: Callable[[], rs.State],
        post: Callable[[ev.Event], None],
        record: Callable[[run_events.RunEvent], None],
    ) -> None:
        self.task = task
        self._settings, self._topology, self._exchanges = settings, topology, exchanges
        self._aggregator, self._outbox = aggregator, outbox
        self._state, self._post, self._record = state, post, record
        self._held: dict[rs.Handle, Held] = {}
        self._room, self._hellos = Room(_MAX_HELD_BYTES), HelloLimiter()
        self._session = uuid.uuid4().hex[:12]
        self._caught_up = asyncio.Event()

    def held(self, handle: rs.Handle) -> Held:
        """Return the update that has this handle."""
        return self._held[handle]

    def ack(self, handle: rs.Handle) -> None:
        """Acknowledge an update and stop holding it."""
        held = self._held.pop(handle, None)
        if held is not None:
            held.delivery.ack()
            held.free()
            self._aggregator.drop(held)

    def reject(self, handle: rs.Handle, reason: str, cause: Cause) -> None:
        """Put an update into the rejected queue and stop holding it."""
        held = self._held.pop(handle, None)
        if held is not None:
            self._reject(held.delivery, MalformedMessage(reason, cause), held.message)
            held.free()

    def link_lost(self) -> None:
        """Forget parked deliveries; read no updates before the first echo over the next link."""
        self._room.link_lost()
        self._caught_up.clear()

    async def send_echoes(self, link: Link, number: int) -> None:
        """Send the link's number to ourselves, all the time; ``machine.clock`` says why."""
        echo = msg.Echo(federation=self._settings.federation, session=self._session, number=number)
        route = Route("", [self._topology.presence], durable=False, urgent=True)
        while True:
            with contextlib.suppress(QueueFull, Unroutable):  # a deleted queue ends the link
                await send(link, echo, route)
            await asyncio.sleep(min(_ECHO_EVERY_S, self._state().hearing_s / 2))

    async def consume_updates(self, link: Link, number: int) -> None:
        """Read the updates queue over the link with this number."""
        # Read all waiting presence first: how an update is judged depends on who is present.
        await self._caught_up.wait()
        prefetch = self._settings.max_workers + 100
        updates = await link.consume(self._topology.updates, prefetch=prefetch)
        count = 0
        async for delivery in updates:
            count += 1
            if self._room.park(delivery):
                continue
            try:
                message, payload = decode(
                    delivery.body,
                    self._settings.federation,
                    max_header=self._aggregator.max_header,
                )
                self._check_sender(message, delivery)
                self._update(message, payload, delivery, rs.Handle(number, count))
            except MalformedMessage as wrong:
                self._reject(delivery, wrong)
            if not self._room.used_bytes:  # it needed no room, so nobody frees any for the parked
                self._room.unpark()

    async def read_presence(self, deliveries: Any) -> None:
        """Read signs of life and our own echoes."""
        async for delivery in deliveries:
            try:
                message, _ = decode(
                    delivery.body, self._settings.federation, max_header=SMALL_HEADER_BYTES
                )
                self._check_sender(message, delivery)
                self._presence(message)
            except MalformedMessage as wrong:
                self._reject(delivery, wrong)
                if wrong.cause == "malformed":
                    self._refuse_hello(delivery, wrong)
            else:
                delivery.ack()

    def _refuse_hello(self, delivery: Delivery, wrong: MalformedMessage) -> None:
        """Answer a hello that could not be decoded, for example of another protocol version."""
        hello = minimal_hello(delivery.body, self._settings.federation)
        if hello is None or self._outbox.was_refused(hello):
            return
        try:
            self._check_sender(hello, delivery)
        except MalformedMessage:
            return
        if hello.protocol == msg.PROTOCOL:
            code = "malformed"
            reason = f"the hello message of worker {hello.worker} is malformed: {wrong}"
        else:
            code = "protocol"
            reason = (
                f"worker {hello.worker} speaks protocol {hello.protocol}, but this coordinator "
                f"speaks protocol {msg.PROTOCOL}; install the same version of fluffle on both sides"
            )
        self._outbox.bind(hello.worker, hello.session, again=True)
        self._outbox.refuse(hello, reason, code, report=True)

    def _presence(self, message: Any) -> None:
        now = monotonic()
        match message:
            case msg.Hello() | msg.Heartbeat() if self._hellos.admit(message, now):
                self._outbox.bind(
                    message.worker, message.session, again=isinstance(message, msg.Hello)
                )
                self.task = self.task or message.task
                worker = rs.Worker(
                    name=message.worker,
                    last_seen=now,
                    model=message.model,
                    heartbeat_s=max(message.heartbeat_s, _LEAST_HEARTBEAT_S),
                    **message.model_dump(include=_WORKER_FIELDS),
                )
                self._post(ev.Seen(now, worker, isinstance(message, msg.Hello)))
            case msg.Hello() | msg.Heartbeat():
                pass
            case msg.Echo(session=session, number=link):
                if session == self._session:  # otherwise from an earlier coordinator
                    self._post(ev.Echoed(now, link))
                    if link == self._state().link:
                        self._caught_up.set()
            case msg.Bye(worker=worker_name, session=session, reason=reason):
                self._hellos.left(worker_name, session)
                self._post(ev.Left(now, worker_name, session, reason))
            case msg.Failure(worker=worker_name, run=run, round=number, reason=reason):
                self._post(ev.Failed(now, worker_name, run, number, reason))
            case _:
                raise _misplaced(message, "heartbeats")

    def _check_sender(self, message: Any, delivery: Delivery) -> None:
        """Check that a message comes from the broker user of the worker that it names."""
        worker = getattr(message, "worker", None)
        if self._settings.verify_users and worker is not None:
            check_user(worker, delivery)

    def _update(
        self, message: Any, payload: memoryview, delivery: Delivery, handle: rs.Handle
    ) -> None:
        now = monotonic()
        match message:
            case msg.Update():
                self._held[handle] = held = Held(delivery, message, payload, self._room)
                self._post(held.arrived(now, handle))
            case msg.Evaluation():
                evaluated = rs.Evaluated(message.num_examples, message.loss, message.metrics)
                of = (message.run, message.round, message.worker)
                self._post(ev.EvaluationArrived(now, *of, evaluated, message.base))
                delivery.ack()
            case msg.FirstWeights() if message.run == self._state().run:
                self._first_weights(message, payload, delivery)
            case msg.Exchange(worker=str()) if message.run == self._state().run:
                for sent, body in handle_exchange(self._exchanges, message, payload):
                    self._outbox.exchange(sent, body)
                delivery.ack()
            case msg.FirstWeights() | msg.Exchange(worker=str()):
                raise MalformedMessage(
                    f"the message belongs to run {message.run}, but this coordinator runs "
                    f"{self._state().run}",
                    "run",
                )
            case _:
                raise _misplaced(message, "updates")

    def _first_weights(
        self, message: msg.FirstWeights, payload: memoryview, delivery: Delivery
    ) -> None:
        """Accept first weights only from the worker that was asked for them."""
        asked = self._state().init_asked
        if self._state().has_weights or asked is None:
            delivery.ack()  # not needed now; if they are later, the worker sends them again
        elif message.worker == asked:
            self._aggregator.take_first(Held(delivery, message, payload, self._room))
        else:
            raise MalformedMessage(
                f"the first weights were requested from {asked}, not from {message.worker}",
                "sender",
            )

    def _reject(
        self, delivery: Delivery, wrong: MalformedMessage, message: msg.Message | None = None
    ) -> None:
        about = {"kind": message.kind, **describe(message)} if message else {}
        details = {"reason": str(wrong), "cause": wrong.cause, **about}
        self._record(run_events.from_fields("rejected", details))
        self._outbox.reject(delivery, wrong)


def _misplaced(message: Any, queue: str) -> MalformedMessage:
    what = f"a message of kind {message.kind} does not belong in the queue for {queue}"
    return MalformedMessage(what, "kind")
