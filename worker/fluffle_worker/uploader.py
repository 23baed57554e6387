"""Sends answers to the broker, each until it is confirmed or obsolete."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable

from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost
from fluffle_common.protocol.events import Unsent
from fluffle_common.protocol.messages import FirstWeights, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Link, QueueFull, Unroutable
from fluffle_common.transport.fetch_parts import read_part
from fluffle_common.transport.messaging import Route, send, send_tensors
from fluffle_worker.error_feedback import Residual
from fluffle_worker.inbox import Record, Refusals
from fluffle_worker.job import Job, NotWanted

_RETRY_S = 1.0
# How long an encoder waits for the previous update's confirmation, whose residual it needs. If that
# takes longer, as on a slow line, it uses none.
_SETTLE_S = 60.0


class Uploader:
    """A queue of answers, sent concurrently and started in order.

    An answer does not wait for the confirmation of the previous one, because the broker may confirm
    an update only when the coordinator acknowledges it, after its round is on disk. Large answers,
    which go in parts through the worker's one outbox, are sent one at a time.

    ``link`` returns the current link, waiting for one if necessary. ``wanted`` returns whether a
    job is still wanted, and ``due`` whether its answer is to be sent; if not, only its evaluation
    is. ``confirmed`` is called with each job whose answer the broker has confirmed, and ``sent``
    with the numbers of parts sent and of all parts of a large answer. ``ready_outbox`` declares the
    worker's queues again, in case they have expired, and waits until the outbox is bound.
    """

    def __init__(
        self,
        topology: Topology,
        worker: str,
        *,
        link: Callable[[], Awaitable[Link]],
        wanted: Callable[[Job], bool],
        due: Callable[[Job], bool],
        confirmed: Callable[[Job], object],
        record: Record,
        sent: Callable[[int, int], None],
        ready_outbox: Callable[[Link], Awaitable[None]],
    ) -> None:
        self._topology, self._worker, self._link = topology, worker, link
        self._wanted, self._due, self._confirmed = wanted, due, confirmed
        self._record, self._parts_sent, self._ready_outbox = record, sent, ready_outbox
        self._refusals = Refusals(topology, worker, record)
        self._unsent: asyncio.Queue[Job] = asyncio.Queue()
        self._in_parts = asyncio.Lock()  # one answer at a time
        self._residual = Residual()  # of the last update that was sent
        self._under_way = 0
        self._settled = threading.Event()  # set while nothing is being sent
        self._settled.set()

    def put(self, job: Job) -> None:
        """Queue a job's evaluation and, if it has one, its answer."""
        self._unsent.put_nowait(job)

    def residual(self) -> Residual:
        """Return the residual of the last update; called in the training thread.

        Blocks while an update is being sent, but at most 60 seconds. It is empty if the update was
        sent but not confirmed.
        """
        self._settled.wait(_SETTLE_S)
        return self._residual

    async def run(self) -> None:
        """Send, until cancelled."""
        try:
            async with asyncio.TaskGroup() as sending:
                while True:
                    job = await self._unsent.get()
                    sending.create_task(self._send_until_confirmed(job))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _send_until_confirmed(self, job: Job) -> None:
        async with job.sending:  # a job's evaluation before its answer
            while self._wanted(job):
                link = await self._link()
                try:
                    return await self._send(link, job)
                except NotWanted:
                    return None
                except (LinkLost, QueueFull, Unroutable) as why:
                    # Sent again under the same identity: the coordinator counts it once.
                    self._record(Unsent(round=job.work.round, reason=str(why)))
                    await asyncio.sleep(_RETRY_S)

    async def _send(self, link: Link, job: Job) -> None:
        due = self._due(job)
        sends = []
        if job.evaluation is not None and not job.evaluation_sent:
            key = f"evaluation.{self._worker}"
            sends.append(send(link, job.evaluation, Route(self._topology.results, [key])))
        if due and job.answer is not None:
            sends.append(self._send_answer(link, job, *job.answer))
        before = self._residual
        sent = Residual(job.work) if due and job.work.kind == "fit" else None
        if sent is not None and before.work != job.work:
            self._residual = sent  # the last one is in this update, and must not go into another
        self._under_way += 1
        self._settled.clear()
        try:
            if len(sends) == 1:  # saves a task, 5 % of a worker's CPU time with a small model
                await sends[0]
            else:  # the evaluation first, so that it arrives before the update closes the round
                await run_all(*sends)
            if sent is not None:
                self._residual = job.residual
        except (NotWanted, QueueFull, Unroutable):  # it did not arrive
            if self._residual is sent:
                self._residual = before
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._settled.set()
        job.evaluation_sent = True
        if due:
            self._confirmed(job)

    async def _send_answer(
        self, link: Link, job: Job, message: Update | FirstWeights, weights: Weights
    ) -> None:
        def progress(done: int, parts: int) -> None:
            if not self._wanted(job):
                raise NotWanted
            self._parts_sent(done, parts)

        async with contextlib.AsyncExitStack() as turn:

            async def before_parts() -> None:
                await turn.enter_async_context(self._in_parts)
                await self._ready_outbox(link)
                # It may still hold parts of earlier answers.
                await self._refusals.drain(link, self._topology.outbox(self._worker), read_part)

            await send_tensors(
                link,
                message,
                weights,
                Route(self._topology.results, [f"{message.kind}.{self._worker}"]),
                others=job.others,
                # Not durable: the worker keeps the answer and sends it again when asked.
                parts=Route(self._topology.results, [f"part.{self._worker}"], durable=False),
                before_parts=before_parts,
                progress=progress,
            )
