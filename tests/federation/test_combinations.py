"""Pairs of features that meet in one run: what one of them does must hold for the other too."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from fluffle_common.protocol.messages import Plan
from fluffle_coordinator.machine.schedules.buffered import Buffered
from fluffle_coordinator.machine.selection import parse_selection
from fluffle_coordinator.storage.replay import replay
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_coordinator.user_code.hooks import Hooks
from fluffle_coordinator.user_code.strategy_loading import load_strategy
from fluffle_worker.local.bound import BoundRule
from tests.federation.harness import Adder

HEAD = Plan(train=("head",))


class TwoParts(Adder):
    """A task whose model has a body and a head."""

    def init(self, seed):
        return {"body": np.float32([2.0, -0.0, 3.0]), "head": np.zeros(3, np.float32)}

    def evaluate(self, weights):
        return None


async def configured(federation, *wait, **options):
    """Start a coordinator that also writes its configuration, which replay needs."""
    coordinator = federation.coordinator(**options)
    await coordinator.log.until("connected")
    store, settings = RunStore(federation.folder), coordinator.service._settings
    store.note_configuration(settings.configuration(federation.topology), len(federation.history()))
    if wait:
        await coordinator.log.until(*wait)
        await coordinator.kill()
    else:
        assert (await coordinator.end()).outcome == "finished"


@pytest.mark.parametrize(
    "name", ["fedavg", "optax:adamw,learning_rate=0.1,weight_decay=0.1", "fedavgm", "rfa+fedadam"]
)
def test_what_is_not_trained_stays_the_same_whatever_the_strategy_does(federated, name):
    async def scenario(federation):
        strategy = load_strategy(name)
        for worker in "abc":
            federation.worker(worker, TwoParts(federation.loop))
        options = {"strategy": strategy, "keep_updates": True}
        await configured(federation, rounds=2, plan=HEAD, **options)
        assert federation.weights(2)["body"].tobytes() == federation.weights(0)["body"].tobytes()
        for number in (1, 2):
            assert replay(federation.folder, number, strategy.strategy).equal

    federated(scenario)


def test_momentum_from_before_a_restart_does_not_move_what_is_no_longer_trained(federated):
    async def scenario(federation):
        strategy = load_strategy("fedavgm:lr=1,momentum=0.5")
        for worker in "ab":
            federation.worker(worker, TwoParts(federation.loop))
        options = {"strategy": strategy, "keep_updates": True}
        await configured(federation, "committed", 2, rounds=4, **options)
        await configured(federation, rounds=4, plan=HEAD, **options)
        head, momentum = 0.0, 0.0
        for number in range(1, 5):
            momentum = 0.5 * momentum + 1.0
            head += momentum
            np.testing.assert_allclose(federation.weights(number)["head"], head)
            body = federation.weights(min(number, 2))["body"]
            np.testing.assert_array_equal(federation.weights(number)["body"], body)
            assert replay(federation.folder, number, strategy.strategy).equal

    federated(scenario)


class Bursting(Adder):
    """A task whose updates become large in round 4."""

    def train(self, weights, plan, progress):
        self.value = 1000.0 if plan.round >= 4 else 1.0
        return super().train(weights, plan, progress)


def test_the_limit_of_norms_survives_a_restart(federated):
    async def scenario(federation):
        federation.worker("a", Bursting(federation.loop, steps=1))
        for worker in "bc":
            federation.worker(worker, Adder(federation.loop))
        options = {"max_norm_ratio": 3.0, "number": 2, "min_workers": 3}
        coordinator = federation.coordinator(4, **options)
        await coordinator.log.until("committed", 3)
        await coordinator.kill()
        coordinator = federation.coordinator(4, **options)
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants()[3] == ["b", "c"]
        (rejected,) = coordinator.log.of("rejected")
        assert (rejected["worker"], rejected["cause"]) == ("a", "norm")
        np.testing.assert_array_equal(federation.weights(4)["w"], 4.0)

    federated(scenario)


def test_a_hook_gets_the_evaluation_from_before_a_restart(federated):
    seen = []

    async def scenario(federation):
        hooks = Hooks(None, seen.append)
        federation.workers(2)
        coordinator = federation.coordinator(3, hooks=hooks)
        await coordinator.log.until("evaluated", 2)  # that of round 2, while round 3 is open
        await coordinator.kill()
        assert (await federation.coordinator(3, hooks=hooks).end()).outcome == "finished"

    federated(scenario)
    evaluations = [dict(commit.evaluation) for commit in seen]
    assert evaluations == [{}, {"loss": 1.0, "accuracy": 0.5}, {"loss": 2.0, "accuracy": 0.5}]


class Counting(Adder):
    """A task whose local rule counts its trainings, across them."""

    def begin(self, received, broadcast, kept):
        return float(kept.get("n", 0.0))

    def gradient(self, gradient, weights, state):
        return gradient, state

    def end(self, trained, state):
        return {"n": np.array(state + 1)}

    def train(self, weights, plan, progress):
        state = self.local_rule.begin(weights)
        result = super().train(weights, plan, progress)
        self.local_rule.end(result.weights, state)
        return result


@pytest.mark.parametrize("first", ["asynchronous", "synchronous"])
def test_a_worker_keeps_its_tensors_when_the_schedule_changes(federated, tmp_path, first):
    schedules = [{"schedule": Buffered(buffer=2)}, {}]
    if first == "synchronous":
        schedules.reverse()

    async def scenario(federation):
        tasks = {}
        for name in "ab":
            task = tasks[name] = Counting(federation.loop)
            task.local_rule = BoundRule(task)
            federation.worker(name, task, state_dir=tmp_path / name)
        coordinator = federation.coordinator(7, **schedules[0])
        await coordinator.log.until("committed", 3)
        await coordinator.kill()
        coordinator = federation.coordinator(7, **schedules[1])
        assert (await coordinator.end()).outcome == "finished"
        for task in tasks.values():
            assert task.local_rule._kept.latest()["n"] == len(task.trained)

    federated(scenario)


@pytest.mark.parametrize("pause_s", [0.0, 10.0])  # with 10 s, the updates wait for the restart
@pytest.mark.parametrize("plans", [(Plan(), HEAD), (HEAD, Plan())])
def test_work_from_before_a_restart_with_other_settings_is_asked_for_again(
    federated, plans, pause_s
):
    async def scenario(federation):
        for worker in "ab":
            federation.worker(worker, TwoParts(federation.loop))
        coordinator = federation.coordinator(3, plan=plans[0])
        await coordinator.log.until("opened", 2)
        await asyncio.sleep(0.5)  # the workers train for a second
        await coordinator.kill()
        await asyncio.sleep(pause_s)
        coordinator = federation.coordinator(3, plan=plans[1])
        assert (await coordinator.end()).outcome == "finished"
        assert coordinator.log.of("rejected")
        assert federation.participants() == [["a", "b"]] * 3
        trained = {1: plans[0], 2: plans[1], 3: plans[1]}
        body = [federation.weights(number)["body"][0] for number in range(4)]
        for number, plan in trained.items():
            assert body[number] - body[number - 1] == (plan.train is None)

    federated(scenario)


@pytest.mark.parametrize("rule", ["uniform", "weighted", "round-robin", "fastest:0"])
def test_a_restart_asks_no_more_workers_than_the_sample(federated, rule):
    async def scenario(federation):
        for steps, worker in enumerate("abcdef", start=2):
            federation.worker(worker, Adder(federation.loop, steps=2 * steps))
        rules = {"sample": 3, "min_workers": 6, "selection": parse_selection(rule)}
        coordinator = federation.coordinator(2, **rules)
        asked = (await coordinator.log.until("opened"))["asked"]
        await coordinator.log.until("counted", 2)
        await coordinator.kill()
        assert (await federation.coordinator(2, **rules).end()).outcome == "finished"
        assert federation.participants()[0] == sorted(asked)
        assert [len(names) for names in federation.participants()] == [3, 3]

    federated(scenario)
