"""What the coordinator publishes, one message after the other, in order.

A publish that a lost link interrupts is dropped here: when the link is back, the round machine
sends again whatever is still wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.protocol.codec import PART_BYTES, Greeting, digest_of, encode_refusal
from fluffle_common.protocol.events import RunEvent, Untold, Waiting
from fluffle_common.protocol.exchanges import Sent
from fluffle_common.protocol.messages import (
    PROTOCOL,
    Evaluate,
    Fit,
    InitRequest,
    Message,
    Plan,
    Refusal,
    Stop,
    Verdict,
    Welcome,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.groups import EXTRA, FROZEN
from fluffle_common.tensors.weights import Weights, size_bytes
from fluffle_common.transport.base import Delivery, Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, reject, send, send_tensors
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.learning_rate import CONSTANT
from fluffle_coordinator.service.serial_queue import SerialQueue
from fluffle_coordinator.strategy.base import NO_TENSORS

if TYPE_CHECKING:
    from fluffle_coordinator.service.settings import CoordinatorSettings

# How long the end of a run may wait for a broker that is away, so that the workers hear of it.
_STOP_PATIENCE_S, _STOP_PAUSE_S = 60.0, 0.1
_REASON_CHARACTERS = 1000
_REFUSED_KEPT = 10_000

Job = Callable[[Link], Awaitable[None]]


class Outbox:
    """The one way out.

    Args:
        topology: where things go.
        run: the run's id.
        settings: the plan that goes with the work, among others.
        link: the link of the moment, None where there is none.
        a_link: returns a link, once there is one.
        record: given what could not be sent.
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
        self._topology, self._run, self._settings = topology, run, settings
        self._link, self._a_link, self._record = link, a_link, record
        self._plan = settings.whole_plan
        # Of which weights, of what is broadcast with them, and what it is.
        self._digest: tuple[Weights, Weights, asyncio.Future[str]] | None = None
        self._refused: dict[tuple[str, str], None] = {}  # worker and session, told once
        # The session of each worker whose queues were bound, over the link of the moment.
        self._bound: dict[str, str] = {}
        self._bound_over: Link | None = None
        self._turns = SerialQueue()
        self.run, self.drained = self._turns.run, self._turns.drained

    def _put(self, job: Job) -> None:
        self._turns.put(lambda: self._do(job))

    async def _do(self, job: Job) -> None:
        link = self._link()
        try:
            if link is not None:
                await job(link)
        except LinkLost:
            pass  # said by whoever watches the link; the machine sends again
        except Unroutable:
            pass  # the worker's inbox is gone, and so is the worker; the machine notices
        except QueueFull as why:
            self._record(Waiting(reason=f"the broker has no room: {why}", what="room"))

    def reject(self, delivery: Delivery, wrong: MalformedMessage) -> None:
        """Put a delivery into the rejected queue with what is wrong, then acknowledge it."""
        self._put(lambda link: reject(link, delivery, wrong, self._topology.rejected))

    def prepare(self, weights: Weights, extra: Weights) -> asyncio.Future[str] | None:
        """Begin to work out the digest of weights: once, for all whom they are sent to.

        None where they travel in one piece, together with what is broadcast beside them.
        """
        if size_bytes(weights) + size_bytes(extra) <= PART_BYTES:
            self._digest = None
        elif self._digest is None or self._digest[0] is not weights or self._digest[1] is not extra:
            hashing = asyncio.to_thread(digest_of, weights, {EXTRA: extra})
            self._digest = weights, extra, asyncio.ensure_future(hashing)
        return self._digest and self._digest[2]

    def bind(self, worker: str, session: str, *, again: bool) -> None:
        """Bind a worker's own queues, before anything is sent to it.

        It has no right to do it itself. ``again``: it may have made them anew.
        """
        link = self._link()
        if link is not self._bound_over:
            self._bound, self._bound_over = {}, link
        if again or self._bound.get(worker) != session:
            self._put(lambda over: self._bind(over, worker, session))

    async def _bind(self, link: Link, worker: str, session: str) -> None:
        there = await link.bind(self._topology.bindings_of(worker))
        if there and link is self._bound_over:  # else its next sign of life asks for it again
            self._bound[worker] = session

    def perform(
        self,
        effect: fx.Effect,
        state: rs.State,
        weights: Weights | None,
        broadcast: Weights = NO_TENSORS,
        frozen: Weights = NO_TENSORS,
    ) -> None:
        """Send what an effect asks for.

        Args:
            effect: the effect.
            state: the machine's, of this moment.
            weights: of this moment.
            broadcast: what travels with them to those who are to train.
            frozen: the model's frozen tensors, which go to those who lack them.
        """
        federation, run = self._settings.federation, self._run
        job: Job
        match effect:
            case fx.Welcome(worker):
                rounds = state.rules.rounds
                hello = Welcome(federation=federation, run=run, round=state.round, rounds=rounds)
                job = self._to(hello, [worker])
            case fx.Refuse(worker, session, reason, code):
                self.refuse(Greeting(PROTOCOL, worker, session), reason, code)
                return
            case fx.Judge():
                job = self._to(self._verdict(effect), [effect.ticket.worker])
            case fx.AskInit(worker):
                seed = state.rules.seed
                job = self._to(InitRequest(federation=federation, run=run, seed=seed), [worker])
            case fx.SendFit(workers, evaluate, sequence, attempt, lacking):
                fit = Fit(
                    federation=federation,
                    run=run,
                    round=state.round,
                    base=state.base,
                    evaluate=evaluate,
                    sequence=sequence,
                    attempt=attempt,
                    plan=self._plan_of(state),
                    **_frozen_of(state),
                )
                beside = broadcast, frozen if lacking else NO_TENSORS
                job = self._with_weights(fit, weights, workers, *beside)
            case fx.SendEvaluate(workers, lacking):
                evaluation = Evaluate(
                    federation=federation,
                    run=run,
                    round=state.round - 1,
                    base=state.base,
                    **_frozen_of(state),
                )
                beside = NO_TENSORS, frozen if lacking else NO_TENSORS
                job = self._with_weights(evaluation, weights, workers, *beside)
            case fx.End(outcome, reason, workers) if workers:
                stop = Stop(
                    federation=federation,
                    run=run,
                    round=state.round - 1,
                    outcome=outcome,
                    reason=reason[:2000],
                )
                self._turns.put(lambda: self._until_sent(self._to(stop, workers)))
                return
            case _:
                return
        self._put(job)

    def _verdict(self, on: fx.Judge) -> Verdict:
        return Verdict(
            federation=self._settings.federation,
            run=self._run,
            round=on.round,
            base=on.base,
            sequence=on.ticket.sequence,
            outcome=on.outcome,
            cause=on.cause,
            reason=on.reason[:_REASON_CHARACTERS],
            train_again=on.train_again,
        )

    def _plan_of(self, state: rs.State) -> Plan:
        """Return the plan of the open round, with the learning rate of that round."""
        base, schedule = self._plan.learning_rate, self._settings.learning_rate_schedule
        if base is None or schedule == CONSTANT:
            return self._plan
        rate = schedule.at(state.round, state.rules.rounds, base)
        return self._plan.model_copy(update={"learning_rate": rate})

    def exchange(self, sent: Sent, body: bytes) -> None:
        """Send a message of a protocol in several phases."""
        route = Route(self._topology.work, sent.workers)
        if sent.workers:
            self._put(lambda link: send(link, sent.message, route, body))

    def refuse(self, to: Greeting, reason: str, code: str) -> None:
        """Tell a worker that it is not in: once in each of its sessions, in its own version."""
        if not self.was_refused(to):
            refusal = Refusal(
                federation=self._settings.federation,
                session=to.session,
                code=code,
                reason=reason[:_REASON_CHARACTERS],
            )
            self._put(self._refuse(refusal, to))

    def was_refused(self, to: Greeting) -> bool:
        """Whether this session of a worker was told already."""
        return (to.worker, to.session) in self._refused

    async def _until_sent(self, job: Job) -> None:
        """Send what nobody would ask for again: over the next link, if this one is lost."""
        try:
            async with asyncio.timeout(_STOP_PATIENCE_S):
                while True:
                    try:
                        await job(await self._a_link())
                    except LinkLost:
                        await asyncio.sleep(_STOP_PAUSE_S)  # the loss is noticed meanwhile
                    else:
                        return
        except (TimeoutError, QueueFull):
            self._record(Untold(waited_s=_STOP_PATIENCE_S))
        except Unroutable:
            pass  # all of their inboxes are gone

    def _to(self, message: Message, workers: Sequence[str]) -> Job:
        return lambda link: send(link, message, Route(self._topology.work, workers))

    def _refuse(self, refusal: Refusal, to: Greeting) -> Job:
        route = Route(self._topology.work, [to.worker])
        body = encode_refusal(refusal, to.protocol)

        async def once(link: Link) -> None:
            who = to.worker, to.session
            if who not in self._refused:
                await send(link, refusal, route, body)
                self._refused[who] = None
                if len(self._refused) > _REFUSED_KEPT:
                    del self._refused[next(iter(self._refused))]

        return once

    def _with_weights(
        self,
        message: Fit | Evaluate,
        weights: Weights | None,
        workers: Sequence[str],
        extra: Weights,
        frozen: Weights,
    ) -> Job:
        """Send weights to all of them in one publish; the checkpoint is their durable copy."""
        assert weights is not None
        route = Route(self._topology.work, workers, durable=False)
        return lambda link: send_tensors(
            link,
            message,
            weights,
            route,
            beside={EXTRA: extra, FROZEN: frozen},
            digest=None if frozen else self.prepare(weights, extra),
        )


def _frozen_of(state: rs.State) -> dict[str, Any]:
    """Return the fields that say which frozen tensors work needs, if any."""
    return {"frozen": state.frozen, "critical": (FROZEN,)} if state.frozen else {}
