"""The messages of a run's coordinator, from the machine's effects and state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluffle_common.protocol.messages import (
    Evaluate,
    Fit,
    InitRequest,
    Plan,
    Refusal,
    Stop,
    Verdict,
    Welcome,
)
from fluffle_common.tensors.groups import FROZEN
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.service.learning_rate import CONSTANT

if TYPE_CHECKING:
    from fluffle_coordinator.service.settings import CoordinatorSettings

_REASON_CHARACTERS = 1000
_STOP_REASON_CHARACTERS = 2000


class Composer:
    """Composes the coordinator's messages, without their tensors."""

    def __init__(self, run: str, settings: CoordinatorSettings) -> None:
        self._of_run: dict[str, Any] = {"federation": settings.federation, "run": run}
        self._plan, self._schedule = settings.whole_plan, settings.learning_rate_schedule

    def welcome(self, state: State) -> Welcome:
        """Return the answer to a worker that is present."""
        return Welcome(**self._of_run, round=state.round, rounds=state.rules.rounds)

    def init_request(self, state: State) -> InitRequest:
        """Return the request for first weights."""
        return InitRequest(**self._of_run, seed=state.rules.seed)

    def fit(self, effect: fx.SendFit, state: State) -> Fit:
        """Return the work of the open round."""
        return Fit(
            **self._of_run,
            round=state.round,
            base=state.base,
            evaluate=effect.evaluate,
            sequence=effect.sequence,
            attempt=effect.attempt,
            plan=self._plan_of(state),
            **_frozen_of(state),
        )

    def evaluate(self, state: State) -> Evaluate:
        """Return the request to evaluate the last model."""
        return Evaluate(**self._of_run, round=state.round - 1, base=state.base, **_frozen_of(state))

    def verdict(self, effect: fx.Judge) -> Verdict:
        """Return what became of an update that does not count."""
        update = effect.update
        return Verdict(
            **self._of_run,
            round=update.round,
            base=update.base,
            sequence=update.ticket.sequence,
            outcome=effect.outcome,
            cause=effect.cause,
            reason=effect.reason[:_REASON_CHARACTERS],
            train_again=effect.outcome == "rejected",
        )

    def stop(self, effect: fx.End, state: State) -> Stop:
        """Return the end of the run."""
        return Stop(
            **self._of_run,
            round=state.round - 1,
            outcome=effect.outcome,
            reason=effect.reason[:_STOP_REASON_CHARACTERS],
        )

    def refusal(self, session: str, reason: str, code: str) -> Refusal:
        """Return the refusal of a worker's session."""
        reason, federation = reason[:_REASON_CHARACTERS], self._of_run["federation"]
        return Refusal(federation=federation, session=session, code=code, reason=reason)

    def _plan_of(self, state: State) -> Plan:
        """Return the plan with the learning rate of the open round."""
        base = self._plan.learning_rate
        if base is None or self._schedule == CONSTANT:
            return self._plan
        rate = self._schedule.at(state.round, state.rules.rounds, base)
        return self._plan.model_copy(update={"learning_rate": rate})


def _frozen_of(state: State) -> dict[str, Any]:
    """Return the fields that say which frozen tensors work needs, if any."""
    return {"frozen": state.frozen, "critical": (FROZEN,)} if state.frozen else {}
