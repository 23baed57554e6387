"""The worker: the asyncio shell around the worker's machine and the training thread.

Training runs in a thread of its own, so that signs of life keep going out; the model is
acknowledged when it has been received, so that the broker never waits for training.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fluffle_common.concurrency import run_all
from fluffle_common.errors import (
    FluffleError,
    LinkLost,
    MalformedMessage,
    RefusedError,
    RunError,
    TaskError,
)
from fluffle_common.protocol.codec import announced, decode
from fluffle_common.protocol.messages import (
    Evaluate,
    Fit,
    InitRequest,
    Part,
    Refusal,
    Stop,
    Update,
    Verdict,
    Welcome,
)
from fluffle_common.protocol.metric_names import beside
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer import Assembly
from fluffle_common.tensors.codecs.registry import CODECS, Registry
from fluffle_common.tensors.layout import Signature
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Delivery, Link, QueueInUse, Transport, tell_of_blocking
from fluffle_common.transport.reconnect import reconnecting
from fluffle_worker import machine
from fluffle_worker.heartbeat import Presence
from fluffle_worker.inbox import Refusals, Tell, check_mail, drain, no_mail, weights_of
from fluffle_worker.job import Job
from fluffle_worker.machine import Work
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.task import Task
from fluffle_worker.trainer import Trainer
from fluffle_worker.training_thread import Training
from fluffle_worker.uploader import Uploader

_INBOX_PREFETCH = 8
_WAITING_EVERY_S = 15.0
# A queue of ours that nobody uses for half an hour expires.
_RENEW_EVERY_S = 600.0
# What a line that tells of an update says besides its metrics.
_FIELDS = frozenset({"event", "federation", "kind", "round", "time", "worker"})
# How often a worker that was here first looks whether a coordinator has come.
_LOOK_AGAIN_S = 0.5


class WorkerService:
    """One data owner's worker.

    Args:
        settings: what the data owner decided.
        task: the model and the data.
        transport: the way to the broker.
        topology: the names on it.
        tell: told what happens.
        bar: told of progress: ``(label, done, total, description)``.
        training: where the task's code runs; a thread of its own unless told.
        form: what the task's model is made of; None: it is found out here.
        codecs: those that updates may be encoded by.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        task: Task,
        *,
        transport: Transport,
        topology: Topology,
        tell: Tell,
        bar: Callable[[str, float, float, str], None],
        training: Training | None = None,
        form: Signature | None = None,
        codecs: Registry = CODECS,
    ) -> None:
        self._settings, self._task = settings, task
        self._transport, self._topology = transport, topology
        self._tell, self._bar = tell, bar
        self._refusals = Refusals(topology, settings.worker)
        self._state = machine.State()
        self._run: str | None = None  # the one that we are in, or were last
        self._welcomed: tuple[str, int, int] | None = None
        self._outcome = "finished"  # of the run that has ended
        self._failed_with: str | None = None  # the last failure of the task in this run
        self._trained = False  # whether it has trained any round of this run
        self._jobs: dict[Work, Job] = {}
        self._assembly: tuple[Fit | Evaluate, Assembly] | None = None
        self._answers = Uploader(
            topology,
            settings.worker,
            link=self._a_link,
            wanted=lambda job: self._jobs.get(job.work) is job,
            due=lambda job: self._state.sending == job.work,
            taken=self._sent,
            tell=tell,
            sent=self._sent_parts,
            renew=self._renew_queues,
        )
        self._trainer = Trainer(
            task,
            {"federation": settings.federation, "worker": settings.worker},
            residual=self._answers.residual,
            progress=self._progress,
            done=self._done,
            tell=tell,
            training=training,
            form=form,
            codecs=codecs,
        )
        self._presence = Presence(settings, task, topology, self._trainer.form)
        self._link: Link | None = None
        self._linked = asyncio.Event()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> str:
        """Work until the run has ended; return why. Cancel it to leave earlier.

        Raises:
            RefusedError: where the coordinator, or the broker, will not have this worker.
            BrokerError: where there has been no broker for too long.
        """
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._links()),
            asyncio.ensure_future(self._answers.run()),
        ]
        try:
            await asyncio.wait({*tasks, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            reason = self._ended.result()
            await self._presence.bye(self._link, reason)
            return reason
        except asyncio.CancelledError:
            await self._presence.bye(self._link, "stopped by its owner")
            raise
        finally:
            for job in self._jobs.values():
                job.wanted = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def verdict(self) -> FluffleError | None:
        """Return why a run that has ended is not one that went well, for the exit code."""
        if self._failed_with and not self._trained:
            return TaskError(
                f"the task failed in every round that it was asked in: {self._failed_with}"
            )
        if self._outcome == "stopped":
            reason = self._ended.result() if self._ended.done() else "unknown"
            return RunError(
                f"the run stopped before its end: {reason}; once the coordinator is started again, "
                "the same command joins again"
            )
        return None

    @property
    def at_work(self) -> bool:
        """Whether the task's code may be at something; only the end of the process ends that."""
        return self._trainer.at_work

    # --- the broker ----------------------------------------------------------------------------

    async def _links(self) -> None:
        def no_broker(reason: str, pause_s: float) -> None:
            self._tell("no_broker", {"reason": reason, "pause_s": pause_s})

        first, occupied_since = True, 0.0
        async with contextlib.aclosing(
            reconnecting(self._transport, self._settings.backoff, no_broker)
        ) as opened:
            async for link in opened:
                try:
                    await self._serve(link, first=first)
                except QueueInUse:
                    now = time.monotonic()
                    patience = {"pause_s": self._settings.occupied_s}
                    if first and not occupied_since:
                        self._tell("occupied", patience)
                    occupied_since = occupied_since or now
                    # One who was in takes it for its own old connection, however long that lives.
                    if first and now - occupied_since >= self._settings.occupied_s:
                        raise RefusedError(
                            f"another worker with the id '{self._settings.worker}' is connected to "
                            f"federation {self._settings.federation}; give this one another --id"
                        ) from None
                    continue
                except LinkLost as gone:
                    self._tell("disconnected", {"reason": str(gone)})
                finally:
                    self._link = None
                    self._linked.clear()
                first, occupied_since = False, 0.0

    async def _serve(self, link: Link, *, first: bool) -> None:
        worker = self._settings.worker
        inbox = self._topology.inbox(worker)
        self._refusals.forget()
        await link.declare(self._topology.queues_of(worker))
        if first:
            await self._drop_old_mail(link, inbox)
        mail = await link.consume(inbox, prefetch=_INBOX_PREFETCH, exclusive=True)
        self._assembly = self._welcomed = None
        self._link = link
        self._linked.set()
        self._tell("connected", {})
        await run_all(
            self._read(link, mail),
            self._be_heard(link),
            self._until_lost(link),
            self._say_that_we_wait(),
            self._keep_queues(link),
            tell_of_blocking(link, self._tell),
        )

    async def _drop_old_mail(self, link: Link, inbox: str) -> None:
        """Drop what was meant for an earlier process, before any of it is delivered to this one."""
        there = await link.counts(inbox)
        if there is not None and not there.consumers:  # else it is another worker's mail
            federation = self._settings.federation
            await drain(
                link,
                inbox,
                lambda body: check_mail(body, federation),
                self._refusals,
                self._tell,
            )

    async def _be_heard(self, link: Link) -> None:
        """Give signs of life, once there is where they go: it is the coordinator that makes it."""
        told = False
        while not await link.exists(self._topology.results):
            if not told:
                self._tell("alone", {"federation": self._settings.federation})
            told = True
            await asyncio.sleep(_LOOK_AGAIN_S)
        await self._refusals.send_waiting(link)
        await self._presence.signs_of_life(link)

    async def _keep_queues(self, link: Link) -> None:
        """Let the broker know that our queues are wanted: those that nobody uses expire."""
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            await self._renew_queues(link)

    async def _renew_queues(self, link: Link) -> None:
        """Declare our queues again; an outbox that was gone has to be bound by the coordinator.

        The inbox, which we consume, does not expire.
        """
        worker = self._settings.worker
        gone = await link.counts(self._topology.outbox(worker)) is None
        await link.declare(self._topology.queues_of(worker))
        if gone:
            await self._presence.greet(link)

    async def _say_that_we_wait(self) -> None:
        began = time.monotonic()
        while self._run is None:
            await asyncio.sleep(_WAITING_EVERY_S)
            if self._run is None:
                self._tell("waiting", {"waited_s": time.monotonic() - began})

    async def _a_link(self) -> Link:
        while self._link is None:
            await self._linked.wait()
        return self._link

    async def _until_lost(self, link: Link) -> None:
        await link.lost()
        raise LinkLost("the link was lost")

    # --- what comes in -------------------------------------------------------------------------

    async def _read(self, link: Link, mail: AsyncIterator[Delivery]) -> None:
        async for delivery in mail:
            try:
                message, payload = decode(delivery.body, self._settings.federation)
                self._receive(message, payload)
            except MalformedMessage as wrong:
                self._tell("rejected", {"reason": str(wrong)})
                await self._refusals.refuse(link, delivery, wrong)
            else:
                delivery.ack()

    def _receive(self, message: Any, payload: memoryview) -> None:
        match message:
            case Welcome(run=run, round=number, rounds=rounds):
                if run != self._run:
                    self._failed_with, self._trained = None, False
                self._run = run
                self._presence.speak_up()
                if self._welcomed != (run, number, rounds):  # else said already
                    self._welcomed = (run, number, rounds)
                    self._tell("welcome", {"run": run, "round": number, "rounds": rounds})
            case Refusal(session=refused, reason=reason) if refused == self._presence.session:
                raise RefusedError(reason)
            case InitRequest():
                self._ask(Work("init", message.run, 0), message, {})
            case Fit() | Evaluate() if message.transfer is not None:
                announced(message)
                self._assembly = message, Assembly(message.transfer, self._settings.max_model_bytes)
                self._presence.now("receiving", message, steps=message.transfer.parts)
            case Fit() | Evaluate():
                self._work(message, payload)
            case Part():
                self._part(message, payload)
            case Stop(run=run, reason=reason) if self._run in (None, run):
                self._outcome = message.outcome
                self._advance(machine.Stopped(reason))
            case Verdict():
                self._judged(message)
            case Refusal() | Stop():
                pass  # it was for an earlier process of this worker, or of an earlier run
            case _:
                raise no_mail(message)

    def _judged(self, verdict: Verdict) -> None:
        """Take what became of an update that does not count."""
        if verdict.run != self._run:
            return
        told = {"round": verdict.round, "reason": verdict.reason}
        self._tell("late" if verdict.outcome == "late" else "not_counted", told)
        if verdict.train_again:
            self._advance(machine.Rejected(verdict.run, verdict.round, verdict.base))

    def _part(self, part: Part, payload: memoryview) -> None:
        if self._assembly is None:
            return
        message, assembly = self._assembly
        assembly.add(part, payload)
        self._presence.progress(assembly.done_parts)
        self._bar("receiving", assembly.done_parts, assembly.transfer.parts, "")
        if assembly.complete:
            self._assembly = None
            self._presence.now("idle", message)
            self._work(message, assembly.payload())

    def _work(self, message: Fit | Evaluate, payload: memoryview) -> None:
        weights = weights_of(message, payload)
        kind = "fit" if isinstance(message, Fit) else "evaluate"
        attempt = message.attempt if isinstance(message, Fit) else 0
        work = Work(kind, message.run, message.round, message.base, attempt)  # type: ignore[arg-type]
        self._ask(work, message, weights)

    def _ask(self, work: Work, message: Fit | Evaluate | InitRequest, weights: Weights) -> None:
        if work not in self._jobs:
            self._jobs[work] = Job(work, message, weights)
        self._jobs[work].evaluation_sent = False  # asked again, it was perhaps lost with the link
        self._advance(machine.Asked(work))
        known = (self._state.doing, self._state.next, self._state.sending, self._state.answered)
        if work not in known:
            del self._jobs[work]  # older than what we have

    # --- the machine ---------------------------------------------------------------------------

    def _advance(self, event: machine.Event) -> None:
        self._state, effects = machine.advance(self._state, event)
        for effect in effects:
            match effect:
                case machine.Begin(work):
                    self._begin(self._jobs[work])
                case machine.Abandon(work):
                    self._jobs[work].wanted = False
                    self._tell("abandoned", {"round": work.round})
                case machine.Send(work):
                    self._presence.now("sending", work)
                    self._answers.put(self._jobs[work])
                case machine.Drop(work):
                    self._jobs.pop(work).wanted = False
                case machine.Report(work, reason):
                    self._failed_with = reason
                    self._tell("failure", {"round": work.round, "reason": reason})
                    self._presence.now("idle", work)
                    self._presence.failed(self._link, work, reason)
                case machine.Leave(reason):
                    self._tell("ended", {"reason": reason})
                    if self._settings.stay:
                        self._forget()
                    elif not self._ended.done():
                        self._ended.set_result(reason)

    def _forget(self) -> None:
        """Let go of a run that has ended; a thread that is still at it ends at its next step."""
        for job in self._jobs.values():
            job.wanted = False
        self._jobs.clear()
        self._state = machine.State()

    # --- the training thread -------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        evaluating = isinstance(job.message, Evaluate) or (
            isinstance(job.message, Fit) and job.message.evaluate
        )
        self._presence.now("evaluating" if evaluating else "training", job.work)
        self._tell("begin", {"round": job.work.round, "kind": job.work.kind})

        def evaluated() -> None:
            self._answers.put(job)
            self._presence.now("training", job.work)

        self._trainer.begin(job, evaluated)

    def _done(self, event: machine.Event) -> None:
        self._trained |= isinstance(event, machine.Finished) and event.work.kind == "fit"
        self._advance(event)

    def _progress(self, work: Work, step: int, steps: int, loss: float | None) -> None:
        if self._state.doing != work:
            return
        self._presence.now("training", work, steps=steps)
        self._presence.progress(step, loss)
        shown = f"round {work.round}" + (f", loss {loss:.4f}" if loss is not None else "")
        self._bar("training", step, steps, shown)

    # --- what goes out -------------------------------------------------------------------------

    def _sent_parts(self, done: int, parts: int) -> None:
        self._presence.sent(done, parts)
        self._bar("sending", done, parts, "")

    def _sent(self, job: Job) -> None:
        self._advance(machine.Sent(job.work))
        if self._state.answered == job.work:  # there is no newer work yet
            self._presence.now("idle", job.work)
        answer = job.answer[0] if job.answer else None
        metrics = answer.metrics if isinstance(answer, Update) else {}
        told = {"round": job.work.round, "kind": job.work.kind, **beside(metrics, _FIELDS)}
        self._tell("sent", told)
