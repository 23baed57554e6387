"""Answers on their way to the broker: each until it has taken it, or nobody wants it any more."""

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
from fluffle_common.tensors.groups import EXTRA, FROZEN
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, send, send_tensors
from fluffle_common.transport.parts import read_part
from fluffle_worker.error_feedback import Residual
from fluffle_worker.inbox import Refusals, Tell, drain
from fluffle_worker.job import Job

_FULL_PAUSE_S = 1.0
# So long a training waits to know whether the broker has taken the update before. On a slow line
# that may take longer; then it begins with what the last update left that was taken.
_SETTLE_S = 60.0


class _NotWanted(Exception):
    """There is newer work: nobody wants the rest of an answer."""


class Uploader:
    """Sends them in the order in which they come.

    The next does not wait until the broker has taken the one before: it may say so only when that
    one's round is on the coordinator's disk.

    Args:
        topology: where they go.
        worker: whose they are.
        link: returns a link, once there is one.
        wanted: whether anybody waits for the answer of a job.
        due: whether a job is done; else only its evaluation is sent.
        taken: told of a job whose answer the broker has taken.
        tell: told what happens.
        sent: told how many parts of how many of an answer have arrived.
        renew: makes our queues anew, if the broker has them no more.
    """

    def __init__(
        self,
        topology: Topology,
        worker: str,
        *,
        link: Callable[[], Awaitable[Link]],
        wanted: Callable[[Job], bool],
        due: Callable[[Job], bool],
        taken: Callable[[Job], object],
        tell: Tell,
        sent: Callable[[int, int], None],
        renew: Callable[[Link], Awaitable[None]],
    ) -> None:
        self._topology, self._worker, self._link = topology, worker, link
        self._wanted, self._due, self._taken = wanted, due, taken
        self._tell, self._parts_sent, self._renew = tell, sent, renew
        self._unsent: asyncio.Queue[Job] = asyncio.Queue()
        self._in_parts = asyncio.Lock()  # one answer at a time
        self._residual = Residual()  # of the last update that was sent
        self._under_way = 0
        self._settled = threading.Event()  # none is under way
        self._settled.set()

    def put(self, job: Job) -> None:
        """Send what there is of a job's answer."""
        self._unsent.put_nowait(job)

    def residual(self) -> Residual:
        """Return what the last update left, once it is known whether the broker has taken it.

        It blocks: it is for the training thread.
        """
        self._settled.wait(_SETTLE_S)
        return self._residual

    async def run(self) -> None:
        """Send, until cancelled."""
        try:
            async with asyncio.TaskGroup() as sending:
                while True:
                    job = await self._unsent.get()
                    sending.create_task(self._send_until_taken(job))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _send_until_taken(self, job: Job) -> None:
        async with job.sending:  # its evaluation first
            while self._wanted(job):
                link = await self._link()
                try:
                    await self._send(link, job)
                except (LinkLost, QueueFull, Unroutable) as why:
                    # Sent again under the same identity: the coordinator counts it once.
                    self._tell(Unsent(round=job.work.round, reason=str(why)))
                    await asyncio.sleep(_FULL_PAUSE_S)
                except _NotWanted:
                    break
                else:
                    break

    async def _send(self, link: Link, job: Job) -> None:
        due = self._due(job)
        works = []
        if job.evaluation is not None and not job.evaluation_sent:
            key = f"evaluation.{self._worker}"
            works.append(send(link, job.evaluation, Route(self._topology.results, [key])))
        if due and job.answer is not None:
            works.append(self._send_answer(link, job, *job.answer))
        self._under_way += 1
        self._settled.clear()
        try:
            if len(works) == 1:
                await works[0]
            else:  # in this order: before its round closes, the evaluation is there
                await run_all(*works)
            if due and job.work.kind == "fit":
                self._residual = job.residual
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._settled.set()
        job.evaluation_sent = True
        if due:
            self._taken(job)

    async def _send_answer(
        self, link: Link, job: Job, message: Update | FirstWeights, weights: Weights
    ) -> None:
        def progress(done: int, parts: int) -> None:
            if not self._wanted(job):
                raise _NotWanted
            self._parts_sent(done, parts)

        async with contextlib.AsyncExitStack() as turn:

            async def before_parts() -> None:
                await turn.enter_async_context(self._in_parts)
                await self._renew(link)
                await self._clear_outbox(link)

            await send_tensors(
                link,
                message,
                weights,
                Route(self._topology.results, [f"{message.kind}.{self._worker}"]),
                beside={EXTRA: job.extra, FROZEN: job.frozen},
                # Kept here until there is newer work, and sent again when asked: so not on disk
                # there.
                parts=Route(self._topology.results, [f"part.{self._worker}"], durable=False),
                before_parts=before_parts,
                progress=progress,
            )

    async def _clear_outbox(self, link: Link) -> None:
        """Drop the parts that nobody will ask for."""
        outbox, federation = self._topology.outbox(self._worker), self._topology.federation
        await drain(
            link,
            outbox,
            lambda body: read_part(body, federation),
            Refusals(self._topology, self._worker),
            self._tell,
        )
