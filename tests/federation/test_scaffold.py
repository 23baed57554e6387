"""The built-in SCAFFOLD with heterogeneous workers, compared with NumPy."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from fluffle_coordinator.user_code.strategy_loading import load_strategy
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.loading import use_local_rule
from fluffle_worker.task import EvalResult, TrainResult
from tests.federation.clock import VirtualLoop

TARGETS = {"a": 1.0, "b": 4.0}
CURVES = {"a": 1.0, "b": 3.0}
STEPS = {"a": 2, "b": 5}
EXAMPLES = {"a": 10, "b": 1000}  # without influence: all workers have the same weight
RATE = 0.125
SIZE = 4


class Descent:
    """Gradient descent on a quadratic; each worker has its own curvature and target."""

    def __init__(self, name: str) -> None:
        self.name, self.num_examples = name, EXAMPLES[name]
        self.local_rule = BoundRule()
        use_local_rule(self, "scaffold")

    def init(self, seed: int) -> Any:
        return {"w": np.zeros(SIZE, np.float32), "steps": np.zeros((), np.int64)}

    def evaluate(self, weights: Any) -> EvalResult:
        return EvalResult(0.0, 1)

    def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
        w, steps = weights["w"], STEPS[self.name]
        state = self.local_rule.begin({"w": w})
        for number in range(1, steps + 1):
            gradient = np.float32(CURVES[self.name]) * (w - np.float32(TARGETS[self.name]))
            changed, state = self.local_rule.gradient({"w": gradient}, {"w": w}, state)
            w = w - np.float32(RATE) * changed["w"]
            progress(number, steps, None)
        self.local_rule.end({"w": w}, state)
        return TrainResult({"w": w, "steps": weights["steps"] + steps}, self.num_examples)


def reference(rounds: int) -> list[float]:
    """Return x after each round: Karimireddy et al. 2020, algorithm 1, option II."""
    x, c, own, values = 0.0, 0.0, dict.fromkeys(TARGETS, 0.0), []
    for _ in range(rounds):
        ends, changed = [], []
        for name, target in TARGETS.items():
            y = x
            for _ in range(STEPS[name]):
                y -= RATE * (CURVES[name] * (y - target) + c - own[name])
            new = own[name] - c + (x - y) / (STEPS[name] * RATE)
            ends.append(y)
            changed.append(new - own[name])
            own[name] = new
        x = float(np.mean(ends))
        c += sum(changed) / len(TARGETS)
        values.append(x)
    return values


def check(federation: Any, rounds: int) -> None:
    for number, expected in enumerate(reference(rounds), start=1):
        np.testing.assert_allclose(federation.weights(number)["w"], expected, rtol=1e-5)


def test_scaffold_matches_the_paper_also_after_a_restart(federated, tmp_path):
    async def scenario(federation):
        for rounds in (2, 5):  # the second coordinator and its workers resume the run
            strategy = load_strategy("scaffold")
            coordinator = federation.coordinator(rounds=rounds, strategy=strategy)
            for name in TARGETS:
                federation.worker(name, Descent(name), state_dir=tmp_path / name)
            assert (await coordinator.end()).outcome == "finished"
            assert not coordinator.log.of("rejected")
        check(federation, 5)

    federated(scenario)


class SlowDescent(Descent):
    """Gradient descent whose steps take virtual time."""

    def __init__(self, name: str, loop: VirtualLoop) -> None:
        super().__init__(name)
        self.loop = loop

    def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
        def step(*done: Any) -> None:
            progress(*done)
            self.loop.sleep(0.25)

        return super().train(weights, plan, step)


@pytest.mark.parametrize("seed", range(10))
def test_scaffold_matches_the_paper_whenever_processes_are_killed(federated, tmp_path, seed):
    async def scenario(federation):
        rng, workers = random.Random(seed), {}

        def worker(name):
            task = SlowDescent(name, federation.loop)
            workers[name] = federation.worker(name, task, state_dir=tmp_path / name)

        def coordinator():
            strategy = load_strategy("scaffold")
            return federation.coordinator(5, strategy=strategy, least=2, deadline_s=30.0)

        for name in TARGETS:
            worker(name)
        current = coordinator()
        for _ in range(4):
            await asyncio.sleep(rng.uniform(0.0, 2.0))
            name, which = rng.choice(list(TARGETS)), rng.choice(["worker", "coordinator", "both"])
            if which != "worker":
                await current.kill()
            if which != "coordinator":
                await workers[name].kill()
                await asyncio.sleep(rng.choice([0.0, 3.0, 15.0]))
                worker(name)
            if which != "worker":
                current = coordinator()
        assert (await current.end()).outcome == "finished"
        check(federation, 5)

    federated(scenario)


def test_the_rule_without_the_strategy_names_what_is_missing(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1)
        workers = [federation.worker(name, Descent(name)) for name in TARGETS]
        failure = await workers[0].log.until("failure")
        assert "start the coordinator with --strategy scaffold" in failure["reason"]
        await coordinator.kill()

    federated(scenario)
