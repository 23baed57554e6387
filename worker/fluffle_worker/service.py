"""The worker: an asyncio shell around the pure machine and the training thread.

Training runs in its own thread, so heartbeats continue meanwhile. A model is acknowledged as soon
as it has been received, because training may take longer than the broker waits for an
acknowledgement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fluffle_common.debug_loggers import log_step, logger
from fluffle_common.errors import FluffleError, RefusedError, RunError, TaskError
from fluffle_common.protocol import events
from fluffle_common.protocol.exchanges import Handlers, handle_exchange
from fluffle_common.protocol.messages import (
    Evaluate,
    Exchange,
    Fit,
    InitRequest,
    Message,
    Part,
    Refusal,
    Stop,
    Update,
    Verdict,
    Welcome,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import Assembly, announced_layout
from fluffle_common.tensors.codecs.registry import CODECS, Registry
from fluffle_common.tensors.layout import Signature
from fluffle_common.transport.base import Link, Transport
from fluffle_common.transport.messaging import Route, send
from fluffle_worker import machine
from fluffle_worker.connection import Connection
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.heartbeat import Presence
from fluffle_worker.inbox import Record, not_for_workers, read_work
from fluffle_worker.job import Executor, Job
from fluffle_worker.local.persistent_tensors import keep_in
from fluffle_worker.machine import Work
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.signature import signature_of_task
from fluffle_worker.task import Task
from fluffle_worker.trainer import Enqueue, Trainer, TrainingThread
from fluffle_worker.uploader import Uploader

_LOG = logger("worker.machine")

# A worker whose update is sent reports once that it waits, after this time.
_WAITING_AFTER_S = 15.0


class WorkerService:
    """One data owner's worker.

    ``record`` is called with each event, and ``bar`` with progress: the label, done, total and a
    description. By default, ``enqueue`` queues trainings for a new thread, and ``signature``, that
    of the task's model, is read from the task.
    """

    _run: str | None = None  # the current or the last run
    _welcomed: tuple[str, int, int] | None = None
    _steps = 0  # of the last training
    _report_due: asyncio.TimerHandle | None = None  # calls ``_still_waiting``

    def __init__(
        self,
        settings: WorkerSettings,
        task: Task,
        *,
        transport: Transport,
        topology: Topology,
        record: Record,
        bar: Callable[[str, float, float, str], None],
        enqueue: Enqueue | None = None,
        signature: Signature | None = None,
        codecs: Registry = CODECS,
        exchanges: Handlers | None = None,
    ) -> None:
        self._settings, self._task, self._topology = settings, task, topology
        self._record, self._bar, self._exchanges = record, bar, exchanges or {}
        keep_in(settings.state_dir, settings.task, task)
        self._state = machine.State()
        self._outcome = "finished"  # of the run, once it has ended
        self._failed_with: str | None = None  # the last failure or rejected update in this run
        self._trained = set[int]()  # the sequences of this run's updates, without rejected ones
        self._jobs: dict[Work, Job] = {}
        self._assembly: tuple[Fit | Evaluate, Assembly] | None = None
        signature = signature_of_task(task) if signature is None else signature
        self._frozen = FrozenTensors(task, settings.state_dir)
        self._presence = Presence(settings, task, topology, signature, self._frozen)
        self._connection = Connection(
            settings,
            self._presence,
            transport=transport,
            topology=topology,
            record=record,
            opened=self._opened,
            receive=self._handle,
            joined=lambda: self._run is not None,
        )
        self._uploader = Uploader(
            topology,
            settings.worker,
            self._connection,
            wanted=lambda job: self._jobs.get(job.work) is job,
            due=lambda job: self._state.sending == job.work,
            confirmed=self._sent,
            record=record,
            sent=self._sent_parts,
        )
        sender = {"federation": settings.federation, "worker": settings.worker}
        self._trainer = Trainer(
            Executor(task, sender, self._frozen, signature, codecs=codecs),
            enqueue or TrainingThread().put,
            residual=self._uploader.residual,
            progress=self._progress,
            done=self._done,
            record=record,
        )
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> str:
        """Work until the run ends and return the reason; cancel it to leave earlier.

        Raises:
            RefusedError: if the coordinator or the broker refuses this worker.
            BrokerError: if the broker stays unreachable for too long.
        """
        parts = self._connection.run, self._uploader.run
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(part()) for part in parts]
        try:
            await asyncio.wait({*tasks, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            reason = self._ended.result()
            await self._presence.bye(self._connection.current, reason)
            return reason
        except asyncio.CancelledError:
            await self._presence.bye(self._connection.current, "stopped by its owner")
            raise
        finally:
            if self._report_due is not None:
                self._report_due.cancel()
            for job in self._jobs.values():
                job.wanted = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def verdict(self) -> FluffleError | None:
        """Return the error to exit with after the run, or None if it went well."""
        if self._failed_with and not self._trained:
            return TaskError(f"the task failed in every round: {self._failed_with}")
        if self._outcome == "stopped":
            reason = self._ended.result() if self._ended.done() else "unknown"
            return RunError(
                f"the run stopped before its end ({reason}); when the coordinator runs again, "
                "start this worker again with the same command"
            )
        return None

    async def settle(self) -> None:
        """Wait until the broker has confirmed all answers that are there to send."""
        await self._uploader.settle()

    @property
    def at_work(self) -> bool:
        """Whether the task's code may still be running; a thread cannot be killed."""
        return self._trainer.at_work

    # --- messages received -----------------------------------------------------------------------

    def _opened(self) -> None:
        """Forget what a lost link had delivered in part; it is sent again over the new one."""
        self._assembly = self._welcomed = None

    async def _handle(self, link: Link, message: Message, payload: memoryview) -> None:
        if not isinstance(message, Exchange):
            self._receive(message, payload)
        elif message.run == self._run:  # otherwise, it is of an earlier run
            for sent, body in handle_exchange(self._exchanges, message, payload):
                key = f"{sent.message.kind}.{self._settings.worker}"
                await send(link, sent.message, Route(self._topology.results, [key]), body)

    def _receive(self, message: Message, payload: memoryview) -> None:
        match message:
            case Fit() | Evaluate() if message.transfer is not None:
                announced_layout(message)
                self._assembly = message, Assembly(message.transfer)
                self._presence.now("receiving", message, steps=message.transfer.parts)
            case Fit() | Evaluate():
                self._work(message, payload)
            case Welcome(run=run, round=number, rounds=rounds):
                if run != self._run:
                    self._failed_with, self._trained = None, set()
                self._run = run
                self._connection.welcomed()
                self._presence.speak_up()
                if self._welcomed != (run, number, rounds):  # not shown yet
                    self._welcomed = (run, number, rounds)
                    self._record(events.Welcomed(run=run, round=min(number, rounds), rounds=rounds))
            case Refusal(session=refused, reason=reason) if refused == self._presence.session:
                raise RefusedError(reason)
            case InitRequest():
                self._ask(Job(message))
            case Part():
                self._part(message, payload)
            case Stop(run=run, reason=reason) if self._run in (None, run):
                self._outcome = message.outcome
                self._advance(machine.Stopped(reason))
            case Verdict():
                self._handle_verdict(message)
            case Refusal() | Stop():
                pass  # meant for an earlier process of this worker, or an earlier run
            case _:
                raise not_for_workers(message)

    def _handle_verdict(self, verdict: Verdict) -> None:
        """Show why an update does not count, and train again if asked to."""
        if verdict.run != self._run:
            return
        sequence = verdict.sequence or verdict.round
        if verdict.outcome == "late":
            self._record(events.Late(worker=self._settings.worker, round=verdict.round))
        else:
            self._trained.discard(sequence)
            self._failed_with = f"its update was rejected: {verdict.reason}"
            reason, cause = verdict.reason, verdict.cause
            self._record(events.NotCounted(round=verdict.round, reason=reason, cause=cause))
        if verdict.train_again:
            self._advance(machine.Rejected(verdict.run, verdict.round, verdict.base, sequence))

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
        weights, broadcast, frozen = read_work(message, payload)
        if message.frozen is not None:
            if self._frozen.receive(frozen):
                self._record(events.FrozenReceived(round=message.round, digest=message.frozen))
                self._presence.speak_up()  # so that they are not sent again
            if message.frozen not in self._frozen.digests:
                self._presence.now("receiving", message)  # lost with a link, they come again
                return
        self._ask(Job(message, weights, broadcast))

    def _ask(self, job: Job) -> None:
        work = job.work
        self._jobs.setdefault(work, job)
        self._jobs[work].evaluation_sent = False  # the last one may have been lost
        self._advance(machine.Asked(work))
        current = (self._state.doing, self._state.next, self._state.sending, self._state.answered)
        if work not in current:
            del self._jobs[work]  # older than the work already here

    # --- the machine -----------------------------------------------------------------------------

    def _advance(self, event: machine.Event) -> None:
        self._state, effects = machine.advance(self._state, event)
        log_step(_LOG, event, effects)
        for effect in effects:
            match effect:
                case machine.Begin(work):
                    self._begin(self._jobs[work])
                case machine.Abandon(work):
                    self._jobs[work].wanted = False
                    self._record(events.Abandoned(round=work.round))
                case machine.Send(work):
                    self._presence.now("sending", work)
                    self._uploader.put(self._jobs[work])
                case machine.Drop(work):
                    self._jobs.pop(work).wanted = False
                case machine.Report(work, reason):
                    self._failed_with = reason
                    worker = self._settings.worker
                    self._record(events.Failure(worker=worker, round=work.round, reason=reason))
                    self._presence.now("idle", work)
                    self._presence.failed(self._connection.current, work, reason)
                case machine.Leave(reason):
                    self._record(events.Ended(reason=reason))
                    if self._settings.stay:
                        self._forget()
                    elif not self._ended.done():
                        self._ended.set_result(reason)

    def _forget(self) -> None:
        """Forget a run that has ended; training still under way stops at its next step."""
        for job in self._jobs.values():
            job.wanted = False
        self._jobs.clear()
        self._state, self._assembly = machine.State(), None
        # Otherwise, the run would not ask this worker again once it is continued.
        self._presence.rest()

    # --- the training thread ---------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        evaluating = isinstance(job.message, Evaluate) or (
            isinstance(job.message, Fit) and job.message.evaluate
        )
        self._presence.now("evaluating" if evaluating else "training", job.work)
        self._record(events.Begun(round=job.work.round, kind=job.work.kind))

        def evaluated() -> None:
            if self._state.doing == job.work:
                self._uploader.put(job)
                self._presence.now("training", job.work)

        self._trainer.begin(job, evaluated)

    def _done(self, job: Job, event: machine.Event) -> None:
        if self._jobs.get(job.work) is not job:
            return  # of a run that was forgotten; when continued, it may ask for the same work
        if isinstance(event, machine.Finished) and event.work.kind == "fit":
            self._trained.add(event.work.sequence)
        self._advance(event)

    def _progress(self, work: Work, step: int, steps: int, loss: float | None) -> None:
        if self._state.doing != work:
            return
        self._presence.now("training", work, steps=steps)
        self._presence.progress(step, loss)
        self._steps = steps
        shown = f"round {work.round}"
        if loss is not None:
            shown += f", loss {events.decimal(loss)}"
        self._bar("training", step, steps, shown)

    # --- messages sent ---------------------------------------------------------------------------

    def _sent_parts(self, done: int, parts: int) -> None:
        self._presence.sent(done, parts)
        self._bar("sending", done, parts, "")

    def _sent(self, job: Job) -> None:
        self._advance(machine.Sent(job.work))
        answer = job.answer[0] if job.answer else None
        metrics = answer.metrics if isinstance(answer, Update) else None
        self._record(events.Sent(round=job.work.round, kind=job.work.kind, metrics=metrics))
        if self._state.answered == job.work:  # no newer work has arrived
            self._presence.now("idle", job.work)
            if job.work.kind == "fit":
                self._wait_for_work(job.work)

    def _wait_for_work(self, work: Work) -> None:
        """Show that the worker waits for the coordinator, since its update is sent."""
        if self._steps:
            shown = f"round {work.round}: update sent; waiting for the coordinator"
            self._bar("training", self._steps, self._steps, shown)
        if self._report_due is not None:
            self._report_due.cancel()
        loop = asyncio.get_running_loop()
        self._report_due = loop.call_later(_WAITING_AFTER_S, self._still_waiting, work)

    def _still_waiting(self, work: Work) -> None:
        """Report that there has been no newer work since an update was sent.

        Without a link, the log names the reason already; the next link starts the wait again.
        """
        linked = self._connection.current is not None
        if linked and self._state.answered == work and self._state.over is None:
            reason = (
                f"round {work.round}: no new work since the update was sent "
                f"{_WAITING_AFTER_S:.0f} s ago; the coordinator may be waiting for "
                "other workers, or may have stopped"
            )
            self._record(events.Waiting(reason=reason, what="coordinator"))
