"""What the coordinator publishes, one message after the other, in order.

A publish that a lost link interrupts is dropped here: when the link is back, the round machine
sends again whatever is still wanted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.messages import (
    Evaluate,
    Fit,
    InitRequest,
    Message,
    Refusal,
    Stop,
    Welcome,
)
from fluffle_common.topology import Topology
from fluffle_common.transfer import Route, reject, send, send_tensors
from fluffle_common.transport import Delivery, Full, Link, Unroutable
from fluffle_common.weights import Weights
from fluffle_coordinator import effects as fx
from fluffle_coordinator import run_state as rs
from fluffle_coordinator.turns import Turns

if TYPE_CHECKING:
    from fluffle_coordinator.service import CoordinatorSettings

Job = Callable[[Link], Awaitable[None]]


class Outgoing:
    """The one way out.

    Args:
        topology: where things go.
        run: the run's id.
        settings: the plan that goes with the work, among others.
        link: the link of the moment, None where there is none.
        tell: told what could not be sent.
    """

    def __init__(
        self,
        topology: Topology,
        run: str,
        settings: CoordinatorSettings,
        link: Callable[[], Link | None],
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._topology, self._run, self._settings = topology, run, settings
        self._link, self._tell = link, tell
        self._plan = settings.plan.model_copy(
            update={"seed": settings.rules.seed, "deadline_s": settings.rules.deadline_s}
        )
        # The session of each worker whose queues were bound, over the link of the moment.
        self._bound: dict[str, str] = {}
        self._bound_over: Link | None = None
        self._turns = Turns()
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
        except Full as why:
            self._tell("waiting", {"reason": f"the broker has no room: {why}"})

    def reject(self, delivery: Delivery, wrong: MalformedMessage) -> None:
        """Put a delivery into the rejected queue with what is wrong, then acknowledge it."""
        self._put(lambda link: reject(link, delivery, wrong, self._topology.rejected))

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

    def perform(self, effect: fx.Effect, state: rs.State, weights: Weights | None) -> None:
        """Send what an effect asks for; ``weights`` are those of this moment."""
        federation, run = self._settings.federation, self._run
        job: Job
        match effect:
            case fx.Welcome(worker):
                rounds = state.rules.rounds
                hello = Welcome(federation=federation, run=run, round=state.round, rounds=rounds)
                job = self._to(hello, [worker])
            case fx.Refuse(worker, session, reason):
                job = self._to(
                    Refusal(federation=federation, session=session, reason=reason[:2000]), [worker]
                )
            case fx.AskInit(worker):
                seed = state.rules.seed
                job = self._to(InitRequest(federation=federation, run=run, seed=seed), [worker])
            case fx.SendFit(workers, evaluate):
                fit = Fit(
                    federation=federation,
                    run=run,
                    round=state.round,
                    base=state.base,
                    evaluate=evaluate,
                    plan=self._plan,
                )
                job = self._with_weights(fit, weights, workers)
            case fx.SendEvaluate(workers):
                evaluation = Evaluate(
                    federation=federation, run=run, round=state.round - 1, base=state.base
                )
                job = self._with_weights(evaluation, weights, workers)
            case fx.End(_, reason, workers) if workers:
                last = state.round - 1
                stop = Stop(federation=federation, run=run, round=last, reason=reason[:2000])
                job = self._to(stop, workers)
            case _:
                return
        self._put(job)

    def _to(self, message: Message, workers: Sequence[str]) -> Job:
        return lambda link: send(link, message, Route(self._topology.work, workers))

    def _with_weights(
        self, message: Fit | Evaluate, weights: Weights | None, workers: Sequence[str]
    ) -> Job:
        """Send weights to all of them in one publish; the checkpoint is their durable copy."""
        assert weights is not None
        route = Route(self._topology.work, workers, durable=False)
        return lambda link: send_tensors(link, message, weights, route)
