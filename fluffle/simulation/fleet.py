"""The simulated clients of a federation, which speak the protocol like workers.

The coordinator sees no difference: all messages travel through the same queues. But one object
plays all clients over one link. It computes a client's answer at once when work arrives, and sends
it when the client's device would have finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fluffle.federation import cannot_take_part
from fluffle.simulation.availability import Availability
from fluffle.simulation.devices import Device
from fluffle.turns import Turns
from fluffle_common.errors import TaskError
from fluffle_common.protocol.events import Traceback, Unfit
from fluffle_common.protocol.messages import (
    Evaluate,
    Fit,
    InitRequest,
    Message,
    Part,
    Refusal,
    Update,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import Assembly
from fluffle_common.protocol.wire_format import decode
from fluffle_common.tensors.layout import Signature
from fluffle_common.tensors.weights import size_bytes
from fluffle_common.transport.base import Body, Delivery, Link, Transport
from fluffle_common.transport.messaging import Route, send, send_tensors
from fluffle_common.user_errors import one_line
from fluffle_worker.error_feedback import Residual
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.heartbeat import Presence
from fluffle_worker.inbox import ReceivedTensors, Record, read_work
from fluffle_worker.job import Executor, Job
from fluffle_worker.machine import Work
from fluffle_worker.results import Results
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.signature import signature_of_task
from fluffle_worker.task import Task

# The heartbeat interval of a client at work. Idle clients send none, since nobody is ever gone.
_HEARTBEAT_S = 60.0
_PREFETCH = 100
# The passes of the event loop in which Ctrl-C, or another cancellation, reaches all clients.
_PASSES = 5


@dataclass(eq=False)
class Client:
    """One simulated client; ``rng`` generates its times present and away."""

    name: str
    task: Task
    device: Device
    availability: Availability
    rng: np.random.Generator
    present: bool
    presence: Presence = field(init=False)  # a new one each time that it comes
    at_work: tuple[Work, asyncio.Task[None]] | None = None
    residual: Residual = field(default_factory=Residual)
    assembly: tuple[Fit | Evaluate, Assembly] | None = None


class Fleet:
    """All clients of a federation.

    ``task`` is the name of their task, for the run's files. ``record`` is called with events about
    the tasks' faults, each reported once for all clients.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        *,
        topology: Topology,
        transport: Transport,
        task: str,
        record: Record,
    ) -> None:
        self._clients, self._topology = clients, topology
        self._transport, self._task = transport, task
        self._acting = ""  # the client whose task is running
        self._turns = Turns()
        self._results = Results(
            report=lambda reason: record(Unfit(reason=f"at {self._acting}, {reason}")),
            trace=lambda text: record(Traceback(text=text)),
        )
        # By task; the parts of one task share those of the whole.
        self._models: dict[int, tuple[Signature, FrozenTensors]] = {}
        self._link: Link
        self._running: asyncio.TaskGroup
        # Cache: the last body decoded, and its tensors once they are decoded.
        self._read: tuple[Body, Message, memoryview] | None = None
        self._brought: ReceivedTensors | None = None

    async def run(self) -> None:
        """Take part until cancelled.

        Raises:
            TaskError: if the coordinator refuses a client.
        """
        self._link = await self._transport.open()
        while not await self._link.exists(self._topology.results):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        readers = []
        for client in self._clients:
            await self._link.declare(self._topology.queues_of(client.name))
            inbox = self._topology.inbox(client.name)
            mail = await self._link.consume(inbox, prefetch=_PREFETCH)
            readers.append(self._read_mail(client, mail))
        try:
            async with asyncio.TaskGroup() as self._running:
                for part in (self._greet(), *readers, *map(self._come_and_go, self._clients)):
                    self._running.create_task(part)
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _greet(self) -> None:
        for client in self._clients:
            if client.present:
                await self._say_hello(client)

    async def _say_hello(self, client: Client) -> None:
        settings = WorkerSettings(
            self._topology.federation, client.name, self._task, heartbeat_s=_HEARTBEAT_S
        )
        client.presence = Presence(settings, client.task, self._topology, *self._model(client))
        await client.presence.greet(self._link)

    async def _come_and_go(self, client: Client) -> None:
        """Let a client leave, which drops its work, and come back, as its availability says."""
        for seconds in client.availability.spells(client.rng, present=client.present):
            await asyncio.sleep(seconds)
            client.present = not client.present
            if client.present:
                await self._say_hello(client)
            else:
                self._drop_work(client)
                await client.presence.bye(self._link, "not available")

    def _drop_work(self, client: Client) -> None:
        client.assembly = None
        if client.at_work is not None:
            client.at_work[1].cancel()
            client.at_work = None

    def _model(self, client: Client) -> tuple[Signature, FrozenTensors]:
        """Return the signature and the frozen tensors of the model of a client's task."""
        whole = getattr(client.task, "whole", client.task)
        if id(whole) not in self._models:
            try:
                self._models[id(whole)] = signature_of_task(client.task), FrozenTensors(whole)
            except TaskError as why:
                raise cannot_take_part(client.name, why) from None
        return self._models[id(whole)]

    # --- messages received ---------------------------------------------------------------------

    async def _read_mail(self, client: Client, mail: Any) -> None:
        delivery: Delivery
        async for delivery in mail:
            if client.present:  # otherwise dropped, like the mail of a worker that restarts
                self._receive(client, delivery.body)
            delivery.ack()

    def _receive(self, client: Client, body: Body) -> None:
        message, payload = self._decoded(body)
        match message:
            case InitRequest():
                self._begin(client, Job(message))
            case Fit() | Evaluate() if message.transfer is not None:
                client.assembly = message, Assembly(message.transfer)
            case Fit() | Evaluate():
                if self._brought is None:
                    self._brought = read_work(message, payload)
                self._work(client, message, self._brought)
            case Part() if client.assembly is not None:
                whole, assembly = client.assembly
                assembly.add(message, payload)
                if assembly.complete:
                    client.assembly = None
                    self._work(client, whole, read_work(whole, assembly.payload()))
            case Refusal():
                raise TaskError(f"the coordinator refuses {client.name}: {message.reason}")
            case _:
                pass  # of no consequence to a simulated client

    def _decoded(self, body: Body) -> tuple[Message, memoryview]:
        """Decode a message; one body sent to many clients is decoded once."""
        if self._read is None or self._read[0] is not body:
            self._read, self._brought = (body, *decode(body, self._topology.federation)), None
        return self._read[1], self._read[2]

    # --- work ----------------------------------------------------------------------------------

    def _work(self, client: Client, message: Fit | Evaluate, received: ReceivedTensors) -> None:
        weights, broadcast, frozen = received
        self._model(client)[1].receive(frozen)
        self._begin(client, Job(message, weights, broadcast))

    def _begin(self, client: Client, job: Job) -> None:
        """Begin a piece of work, unless it is already under way; newer work ends older."""
        if client.at_work is not None:
            doing, task = client.at_work
            if doing == job.work:
                return
            task.cancel()
        client.at_work = job.work, self._running.create_task(self._do(client, job))

    async def _do(self, client: Client, job: Job) -> None:
        steps = 0

        def progress(_: int, of: int, __: float | None) -> None:
            nonlocal steps
            steps = of

        moved = size_bytes(job.weights) + size_bytes(job.broadcast)
        signature, frozen = self._model(client)
        sender = {"federation": self._topology.federation, "worker": client.name}
        executor = Executor(client.task, sender, frozen, signature, self._results)
        async with self._turns.turn(client.name):
            for _ in range(_PASSES):  # otherwise, all clients of a round would train in one pass
                await asyncio.sleep(0)
            self._acting = client.name
            try:
                executor.execute(
                    job,
                    evaluated=lambda: None,
                    progress=progress,
                    residual=lambda: client.residual,
                )
            except BaseException as why:  # as in Trainer, even SystemExit
                trace = why.__traceback__  # begins with this function
                self._results.failed(why.with_traceback(trace and trace.tb_next))
                client.at_work = None
                client.presence.failed(self._link, job.work, one_line(why))
                return
        if job.answer is not None:
            moved += size_bytes(job.answer[1]) + sum(map(size_bytes, job.others.values()))
        device = client.device
        seconds = moved / device.bytes_per_s
        if job.work.kind == "fit":
            seconds += device.fit_s + steps * device.step_s
        await self._pass(client, job.work, steps, seconds)
        client.at_work = None
        await self._answer(client, job, seconds)

    async def _pass(self, client: Client, work: Work, steps: int, seconds: float) -> None:
        """Let the time of a piece of work pass, sending heartbeats meanwhile."""
        client.presence.now("training", work, steps=steps)
        left_s = seconds
        while left_s > _HEARTBEAT_S:
            await asyncio.sleep(_HEARTBEAT_S)
            left_s -= _HEARTBEAT_S
            client.presence.progress(int(steps * (1 - left_s / seconds)))
            await client.presence.beat(self._link)
        await asyncio.sleep(left_s)

    async def _answer(self, client: Client, job: Job, seconds: float) -> None:
        name, results = client.name, self._topology.results
        if job.evaluation is not None:
            await send(self._link, job.evaluation, Route(results, [f"evaluation.{name}"]))
        if job.answer is None:
            return
        message, weights = job.answer
        if isinstance(message, Update):
            message = message.model_copy(update={"seconds": seconds})
            client.residual = job.residual
        await send_tensors(
            self._link,
            message,
            weights,
            Route(results, [f"{message.kind}.{name}"]),
            others=job.others,
            parts=Route(results, [f"part.{name}"], durable=False),
        )
