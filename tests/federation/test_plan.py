"""The training plan that a task receives in each round."""

from __future__ import annotations

from typing import Any

from fluffle_common.protocol.messages import Plan
from fluffle_coordinator.service.learning_rate import LearningRateSchedule
from tests.federation.harness import Adder


class Told(Adder):
    """A task that stores the plans that it receives."""

    def train(self, weights: Any, plan: Any, progress: Any) -> Any:
        self.__dict__.setdefault("plans", []).append(plan)
        return super().train(weights, plan, progress)


def test_a_plan_contains_the_round_the_steps_and_the_learning_rate(federated):
    async def scenario(federation):
        task = Told(federation.loop)
        coordinator = federation.coordinator(
            rounds=4,
            plan=Plan(steps=7, learning_rate=0.8),
            learning_rate_schedule=LearningRateSchedule.parse("step:2,0.5"),
        )
        federation.worker("a", task)
        federation.worker("b")
        ended = await coordinator.end()
        received = [(plan.round, plan.steps, plan.learning_rate) for plan in task.plans]
        assert received == [(1, 7, 0.8), (2, 7, 0.8), (3, 7, 0.4), (4, 7, 0.4)]
        assert {plan.run for plan in task.plans} == {ended.run}
        assert len({plan.seed for plan in task.plans}) == 4

    federated(scenario)
