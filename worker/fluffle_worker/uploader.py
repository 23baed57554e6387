"""Sends answers to the broker, each until it is confirmed or obsolete."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable

from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost
from fluffle_common.protocol.events import Unsent
from fluffle_common.protocol.messages import FirstWeights, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, send, send_tensors
from fluffle_worker.connection import Connection
from fluffle_worker.error_feedback import Residual
from fluffle_worker.inbox import Record
from fluffle_worker.job import Job, NotWanted

_RETRY_S = 1.0
# How long an encoder waits for the previous update's confirmation, whose residual it needs. If that
# takes longer, as on a slow line, it uses none.
_SETTLE_S = 60.0


class Uploader:
    """Sends answers concurrently, started in order, while ``run`` runs.

    An answer does not wait for the confirmation of the previous one, because the broker may confirm
    an update only when the coordinator acknowledges it, after its round is on disk. Large answers,
    which go in parts through the worker's one outbox, are sent one at a time.

    ``wanted`` returns whether a job is still wanted, and ``due`` whether its answer is to be sent;
    if not, only its evaluation is. ``confirmed`` is called with each job whose answer the broker
    has confirmed, and ``sent`` with the numbers of parts sent and of all parts of a large answer.
    """

    def __init__(
        self,
        topology: Topology,
        worker: str,
        connection: Connection,
        *,
        wanted: Callable[[Job], bool],
        due: Callable[[Job], bool],
        confirmed: Callable[[Job], object],
        record: Record,
        sent: Callable[[int, int], None],
    ) -> None:
        self._connection = connection
        self._routes = {
            kind: Route(topology.results, [f"{kind}.{worker}"])
            for kind in ("evaluation", "first_weights", "update")
        }
        # Not durable: the worker keeps the answer and sends it again when asked.
        self._parts_route = Route(topology.results, [f"part.{worker}"], durable=False)
        self._wanted, self._due, self._confirmed = wanted, due, confirmed
        self._record, self._parts_sent = record, sent
        self._sending: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._in_parts = asyncio.Lock()  # one answer at a time
        self._residual = Residual()  # of the last update that was sent
        self._under_way = 0
        self._settled = threading.Event()  # set while nothing is being sent
        self._settled.set()

    def put(self, job: Job) -> None:
        """Start to send a job's evaluation and, if it has one, its answer.

        Does nothing once ``run`` has ended: the training thread may finish later.
        """
        if self._ended.done():
            return
        task = asyncio.create_task(self._send_until_confirmed(job))
        self._sending.add(task)
        task.add_done_callback(self._over)

    def residual(self) -> Residual:
        """Return the residual of the last update; called in the training thread.

        Blocks while an update is being sent, but at most 60 seconds. It is empty if the update was
        sent but not confirmed.
        """
        self._settled.wait(_SETTLE_S)
        return self._residual

    async def settle(self) -> None:
        """Wait until nothing is being sent."""
        while self._sending:
            await asyncio.wait(self._sending)

    async def run(self) -> None:
        """Raise the first error of an answer; stop sending when cancelled."""
        try:
            await self._ended
        finally:
            for task in self._sending:
                task.cancel()
            await asyncio.gather(*self._sending, return_exceptions=True)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (why := task.exception()) and not self._ended.done():
            self._ended.set_exception(why)

    async def _send_until_confirmed(self, job: Job) -> None:
        reported = ""  # a queue may stay full for hours
        async with job.sending:  # a job's evaluation before its answer
            while self._wanted(job):
                link = await self._connection.link()
                try:
                    return await self._send(link, job)
                except NotWanted:
                    return None
                except (LinkLost, QueueFull, Unroutable) as why:
                    # Sent again under the same identity: the coordinator counts it once.
                    if str(why) != reported:
                        reported = str(why)
                        self._record(Unsent(round=job.work.round, reason=reported))
                    await asyncio.sleep(_RETRY_S)

    async def _send(self, link: Link, job: Job) -> None:
        due = self._due(job)
        sends = []
        if job.evaluation is not None and not job.evaluation_sent:
            sends.append(send(link, job.evaluation, self._routes["evaluation"]))
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

        await send_tensors(
            link,
            message,
            weights,
            self._routes[message.kind],
            others=job.others,
            parts=self._parts_route,
            around_parts=functools.partial(self._with_outbox, link),
            progress=progress,
        )

    @contextlib.asynccontextmanager
    async def _with_outbox(self, link: Link) -> AsyncIterator[None]:
        async with self._in_parts:
            await self._connection.ready_outbox(link)
            yield
