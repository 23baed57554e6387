"""The outbox: composes and publishes all that the coordinator sends, one message at a time.

A publish that a lost link interrupts is dropped: once the link is back, the machine sends again
what is still needed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost
from fluffle_common.protocol import messages as msg
from fluffle_common.protocol.events import Refused, RunEvent, Untold, Waiting
from fluffle_common.protocol.exchanges import Sent
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import digest_of
from fluffle_common.protocol.wire_format import PART_BYTES, MinimalHello, encode_refusal
from fluffle_common.tensors.groups import EXTRA, FROZEN, Groups
from fluffle_common.tensors.weights import Weights, size_bytes
from fluffle_common.transport.base import Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, send, send_ahead, send_tensors
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.learning_rate import CONSTANT
from fluffle_coordinator.service.rejected_queue import RejectedQueue
from fluffle_coordinator.service.serial_queue import SerialQueue
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.strategy.base import NO_TENSORS

# How long the end of a run waits for an unreachable broker to deliver the stop message.
_STOP_PATIENCE_S, _STOP_PAUSE_S = 60.0, 0.1
_MAX_REFUSED = 10_000
# How many answers to a worker's messages may wait to be sent. Further ones are dropped: whatever a
# worker sends, and however often, the work of the others does not wait behind answers to it.
_MAX_ANSWERS = 4
_REASON_CHARACTERS, _STOP_REASON_CHARACTERS = 1000, 2000

Job = Callable[[Link], Awaitable[None]]


@dataclass(eq=False)
class _Ahead:
    """Work that is sent ahead of its effect, all but the last part of its weights."""

    effect: fx.SendFit
    fit: msg.Fit | msg.Evaluate
    # Set once the other parts are sent: the link that they went over, and what sends the last one.
    link: Link | None = None
    send_last: Callable[[], Awaitable[None]] | None = None


class Outbox:
    """Publishes the coordinator's messages.

    ``link`` returns the current link, or None while disconnected; ``a_link`` waits for one.
    """

    def __init__(
        self,
        topology: Topology,
        run: str,
        settings: CoordinatorSettings,
        *,
        link: Callable[[], Link | None],
        a_link: Callable[[], Awaitable[Link]],
        record: Callable[[RunEvent], None],
    ) -> None:
        self._topology = topology
        self._of_run: dict[str, Any] = {"federation": settings.federation, "run": run}
        self._plan, self._schedule = settings.whole_plan, settings.learning_rate_schedule
        self._link, self._a_link, self._record = link, a_link, record
        # The weights and broadcast tensors that were last prepared, and their digest.
        self._digest: tuple[Weights, Weights, asyncio.Future[str]] | None = None
        self._ahead: _Ahead | None = None
        self._refused: dict[tuple[str, str], None] = {}  # (worker, session), in insertion order
        # The session of each worker whose queues are bound, or being bound, over ``_bound_over``.
        self._bound: dict[str, str] = {}
        self._bound_over: Link | None = None
        # How many messages with weights, and how many answers, wait here, by worker.
        self._under_way, self._answers = Counter[str](), Counter[str]()
        self._jobs = SerialQueue()
        self._rejected_queue = RejectedQueue(topology.rejected, self._do)
        self.reject = self._rejected_queue.put

    async def run(self) -> None:
        """Publish until cancelled."""
        await run_all(self._jobs.run(), self._rejected_queue.run())

    async def drained(self) -> None:
        """Wait until everything is published."""
        await self._jobs.drained()
        await self._rejected_queue.drained()

    def _put(self, job: Job) -> None:
        self._jobs.put(lambda: self._do(job))

    def _put_counted(self, job: Job, workers: Sequence[str], waiting: Counter[str]) -> None:
        waiting.update(workers)

        async def send_counted() -> None:
            try:
                await self._do(job)
            finally:
                for worker in workers:
                    waiting[worker] -= 1
                    if not waiting[worker]:
                        del waiting[worker]

        self._jobs.put(send_counted)

    def _answer(self, worker: str, job: Job) -> bool:
        """Put a job that a worker's message caused; return False if too many of these wait."""
        if self._answers[worker] >= _MAX_ANSWERS:
            return False
        self._put_counted(job, (worker,), self._answers)
        return True

    async def _do(self, job: Job) -> None:
        link = self._link()
        try:
            if link is not None:
                await job(link)
        except LinkLost:
            pass  # the coordinator reports it; the machine sends again
        except Unroutable:
            pass  # the inbox expired with its worker; the machine notices the missing heartbeats
        except QueueFull as why:
            self._record_refusal(why)

    def _record_refusal(self, why: QueueFull) -> None:
        reason = f"the broker has no room for a message ({why}); see 'fluffle queues'"
        self._record(Waiting(reason=reason, what="room"))

    def prepare(self, weights: Weights, extra: Weights) -> asyncio.Future[str] | None:
        """Start to compute the digest of the weights and broadcast tensors, once per version.

        Return None if they fit into one message, which needs no digest.
        """
        if size_bytes(weights) + size_bytes(extra) <= PART_BYTES:
            self._digest = None
        elif self._digest is None or self._digest[0] is not weights or self._digest[1] is not extra:
            hashing = asyncio.to_thread(digest_of, weights, {EXTRA: extra})
            self._digest = weights, extra, asyncio.ensure_future(hashing)
        return self._digest and self._digest[2]

    def bind(self, worker: str, session: str, *, again: bool) -> None:
        """Bind a worker's inbox and outbox, which the worker itself has no permission to do.

        ``again`` binds even if this session was bound already, since the worker may have redeclared
        its queues, or somebody deleted the binding.
        """
        link = self._link()
        if link is not self._bound_over:
            self._bound, self._bound_over = {}, link
        if again or self._bound.get(worker) != session:
            self._bound[worker] = session  # now, or every sign of life would add a job meanwhile
            if not self._answer(worker, lambda over: self._bind(over, worker)):
                del self._bound[worker]

    async def _bind(self, link: Link, worker: str) -> None:
        bound = await link.bind(self._topology.bindings_of(worker))
        if not bound and link is self._bound_over:
            self._bound.pop(worker, None)  # the next sign of life tries again

    def perform(
        self,
        effect: fx.Effect,
        state: rs.State,
        weights: Weights | None,
        broadcast: Weights = NO_TENSORS,
        frozen: Weights = NO_TENSORS,
    ) -> None:
        """Send the message of an effect.

        ``broadcast`` travels with the model to training workers, and ``frozen`` to those that lack
        the model's frozen tensors.
        """
        match effect:
            case fx.SendFit(workers) | fx.SendEvaluate(workers):
                if effect.repeat and any(self._under_way[worker] for worker in workers):
                    return  # over a slow line, the first copy has not left yet
                assert weights is not None
                extra = broadcast if isinstance(effect, fx.SendFit) else NO_TENSORS
                others = {EXTRA: extra, FROZEN: frozen if effect.frozen else NO_TENSORS}
                job = self._rest_of(effect, self._work(effect, state), weights, others)
                self._put_counted(job, workers, self._under_way)
            case fx.Welcome(worker):
                self._ahead = None  # the worker's new link or process has not received it
                rounds = state.rules.rounds
                welcome = msg.Welcome(**self._of_run, round=state.round, rounds=rounds)
                self._put(self._to(welcome, [worker]))
            case fx.AskInit(worker):
                request = msg.InitRequest(**self._of_run, seed=state.rules.seed)
                self._put(self._to(request, [worker]))
            case fx.Refuse(worker, session, reason, code):
                self.refuse(MinimalHello(msg.PROTOCOL, worker, session), reason, code)
            case fx.Judge(update, outcome, reason, cause):
                verdict = msg.Verdict(
                    **self._of_run,
                    round=update.round,
                    base=update.base,
                    sequence=update.ticket.sequence,
                    outcome=outcome,
                    cause=cause,
                    reason=reason[:_REASON_CHARACTERS],
                    train_again=outcome == "rejected",
                )
                worker = update.ticket.worker
                self._answer(worker, self._to(verdict, [worker]))
            case fx.End(outcome, reason, workers) if workers:
                reason, number = reason[:_STOP_REASON_CHARACTERS], state.round - 1
                stop = msg.Stop(**self._of_run, round=number, outcome=outcome, reason=reason)
                self._jobs.put(lambda: self._until_sent(self._to(stop, workers)))

    def _work(
        self, effect: fx.SendFit | fx.SendEvaluate, state: rs.State
    ) -> msg.Fit | msg.Evaluate:
        """Return the work of the open round, or the request to evaluate the last model."""
        about = {**self._of_run, "base": state.base}
        if state.frozen:
            about |= {"frozen": state.frozen, "critical": (FROZEN,)}
        if isinstance(effect, fx.SendEvaluate):
            return msg.Evaluate(**about, round=state.round - 1)
        plan = self._plan
        if plan.learning_rate is not None and self._schedule != CONSTANT:
            rate = self._schedule.at(state.round, state.rules.rounds, plan.learning_rate)
            plan = plan.model_copy(update={"learning_rate": rate})
        return msg.Fit(
            **about,
            round=state.round,
            evaluate=effect.evaluate,
            sequence=effect.sequence,
            attempt=effect.attempt,
            plan=plan,
        )

    def begin(
        self, effect: fx.SendFit, state: rs.State, weights: Weights, broadcast: Weights
    ) -> None:
        """Send work ahead of the effect that is expected, all but the last part of its weights.

        ``perform`` sends the rest if the effect and the work turn out to be the same; otherwise, it
        sends the work in full, which replaces what was begun. Workers therefore cannot train from
        weights that are not on disk.
        """
        if effect.frozen:
            return
        fit, digest = self._work(effect, state), self.prepare(weights, broadcast)
        route, others = self._to_inboxes(effect.workers), {EXTRA: broadcast}
        assert digest is not None
        self._ahead = ahead = _Ahead(effect, fit)

        async def job(link: Link) -> None:
            ahead.send_last = await send_ahead(
                link, fit, weights, route, others=others, digest=digest
            )
            ahead.link = link

        self._put(job)

    def _rest_of(
        self,
        effect: fx.SendFit | fx.SendEvaluate,
        work: msg.Fit | msg.Evaluate,
        weights: Weights,
        others: Groups,
    ) -> Job:
        """Return the job that sends what is missing of work: its last part, or everything."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead.effect, ahead.fit) != (effect, work):
            ahead = None
        route = self._to_inboxes(effect.workers)

        async def job(link: Link) -> None:
            if ahead is not None and ahead.link is link and ahead.send_last is not None:
                await ahead.send_last()
            else:
                digest = None if others[FROZEN] else self.prepare(weights, others[EXTRA])
                await send_tensors(link, work, weights, route, others=others, digest=digest)

        return job

    def exchange(self, sent: Sent, body: bytes) -> None:
        """Send a message of a multi-phase protocol."""
        route = Route(self._topology.work, sent.workers)
        if sent.workers:
            self._put(lambda link: send(link, sent.message, route, body))

    def refuse(self, to: MinimalHello, reason: str, code: str, *, report: bool = False) -> None:
        """Send a refusal, in the worker's protocol version and once per session.

        ``report`` records an event when it is sent, as the machine does for its own refusals.
        """
        federation, shown = self._of_run["federation"], reason[:_REASON_CHARACTERS]
        refusal = msg.Refusal(federation=federation, session=to.session, code=code, reason=shown)
        route = Route(self._topology.work, [to.worker])

        async def refuse_once(link: Link) -> None:
            if not self.was_refused(to):
                await send(link, refusal, route, encode_refusal(refusal, to.protocol))
                if report:
                    self._record(Refused(worker=to.worker, reason=reason))
                self._refused[to.worker, to.session] = None
                if len(self._refused) > _MAX_REFUSED:
                    del self._refused[next(iter(self._refused))]

        self._answer(to.worker, refuse_once)

    def was_refused(self, to: MinimalHello) -> bool:
        """Whether a refusal was sent to this session already."""
        return (to.worker, to.session) in self._refused

    async def _until_sent(self, job: Job) -> None:
        """Send a message that the machine does not repeat; if the link is lost, use the next."""
        try:
            async with asyncio.timeout(_STOP_PATIENCE_S):
                while True:
                    try:
                        await job(await self._a_link())
                    except LinkLost:
                        await asyncio.sleep(_STOP_PAUSE_S)  # until the coordinator drops the link
                    else:
                        return
        except TimeoutError:
            self._record(Untold(waited_s=_STOP_PATIENCE_S))
        except QueueFull as why:  # the queue of one worker; the others have it
            self._record_refusal(why)
        except Unroutable:
            pass  # all inboxes have expired

    def _to(self, message: msg.Message, workers: Sequence[str]) -> Job:
        return lambda link: send(link, message, Route(self._topology.work, workers))

    def _to_inboxes(self, workers: Sequence[str]) -> Route:
        """Return the route of weights: not durable, since there is a checkpoint."""
        return Route(self._topology.work, workers, durable=False)
