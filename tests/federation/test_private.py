"""Central differential privacy: Poisson sampling, empty rounds, budgets and crashes."""

from __future__ import annotations

import asyncio
import json
import secrets

import numpy as np
import pytest
from click.testing import CliRunner

from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.checkpoint import checkpoint_name
from fluffle_coordinator.cli.history import history
from fluffle_coordinator.cli.run_folder import report
from fluffle_coordinator.machine.selection import POISSON, Draw
from fluffle_coordinator.machine.state import Rules
from fluffle_coordinator.strategy import accountant
from fluffle_coordinator.user_code.strategy_loading import load_strategy, rules_for
from tests.federation.harness import Adder

RATE = 0.3
NAMES = "abcd"


@pytest.fixture
def counting(monkeypatch):
    """Replace dp-accounting by an accountant for which a round costs epsilon 0.1."""
    monkeypatch.setattr(accountant, "_library", lambda _: None)
    monkeypatch.setitem(accountant._METHODS, "pld", lambda _, rounds: rounds / 10)
    monkeypatch.setitem(accountant._METHODS, "rdp", lambda _, rounds: rounds / 8)


def sampled(more=""):
    strategy = load_strategy(f"dp:clip=1,noise=4,workers=1,rate={RATE}{more}")
    rules = rules_for(strategy, Rules(rounds=1000))
    options = {"strategy": strategy, "selection": POISSON, "fraction": rules.fraction}
    return {"rounds": rules.rounds, **options}


def drawn(secret, number):
    return [name for name in NAMES if Draw(secret, number).chance(name) <= RATE]


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("secret", range(3))
def test_workers_are_sampled_independently_and_the_budget_ends_the_run(
    federated, monkeypatch, secret
):
    monkeypatch.setattr(secrets, "randbits", lambda _: secret)

    async def scenario(federation):
        rules = sampled(",budget=1.25")
        assert rules["rounds"] == 12  # not the 10 of the faster, looser bound
        for name in NAMES:
            federation.worker(name)
        ended = None
        while ended is None:
            coordinator = federation.coordinator(min_workers=4, **rules)
            committed = asyncio.ensure_future(coordinator.log.until("committed"))
            await asyncio.wait({committed, coordinator.running}, return_when="FIRST_COMPLETED")
            if coordinator.running.done():
                ended = coordinator.running.result()
            committed.cancel()
            await coordinator.kill()
        assert ended.outcome == "finished"
        lines = federation.history()
        samples = [drawn(secret, number) for number in range(1, 13)]
        assert federation.participants() == samples
        assert [line["asked"] for line in lines] == samples
        assert [line["epsilon"] for line in lines] == [number / 10 for number in range(1, 13)]
        assert not (federation.folder / checkpoint_name(13)).exists()

    federated(scenario)


@pytest.mark.usefixtures("counting")
def test_an_empty_round_adds_only_noise(federated, monkeypatch):
    monkeypatch.setattr(Draw, "chance", lambda draw, name: 1.0 if draw.number == 2 else 0.0)

    async def scenario(federation):
        tasks = [Adder(federation.loop) for _ in NAMES]
        for name, task in zip(NAMES, tasks, strict=True):
            federation.worker(name, task)
        coordinator = federation.coordinator(min_workers=4, **{**sampled(), "rounds": 3})
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [list(NAMES), [], list(NAMES)]
        assert [len(task.trained) for task in tasks] == [2] * 4
        before, after = (federation.weights(number)["w"] for number in (1, 2))
        assert not np.array_equal(before, after)
        assert coordinator.log.of("committed")[1]["participants"] == []
        shown = CliRunner().invoke(history, [str(federation.folder)])
        assert shown.exit_code == 0, shown.output
        shown = CliRunner().invoke(report, [str(federation.folder), "--json"])
        curves = json.loads(shown.output)["curves"]
        assert curves.keys() == {"rounds", "loss", "training loss", "accuracy", "epsilon"}
        assert curves["epsilon"] == [0.1, 0.2, 0.3]
        assert curves["training loss"] == [0.5, None, 0.5]

    federated(scenario)


@pytest.mark.usefixtures("counting")
def test_a_reopened_round_keeps_its_sample(federated, monkeypatch):
    monkeypatch.setattr(Draw, "chance", lambda draw, name: 0.0 if name in "ab" else 1.0)

    async def scenario(federation):
        rules = {**sampled(), "rounds": 1, "deadline_s": 30.0}
        for name in "acd":
            federation.worker(name)
        lost = federation.worker("b", Adder(federation.loop, step_s=1e4))
        coordinator = federation.coordinator(min_workers=4, **rules)
        await coordinator.log.until("opened")
        await lost.kill()
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["a"]]
        assert federation.history()[0]["asked"] == ["a", "b"]

    federated(scenario)


def test_noise_changes_only_trained_tensors(federated):
    class Frozen(Adder):
        def init(self, seed):
            return {"body/w": np.full(4, -0.0, np.float32), "head/w": np.zeros(4, np.float32)}

        def evaluate(self, weights):
            return super().evaluate({"w": weights["head/w"]})

    async def scenario(federation):
        coordinator = federation.coordinator(
            rounds=2, strategy=load_strategy("dp:clip=1,noise=4,workers=2"),
            plan=Plan(train=("head/*",)),
        )  # fmt: skip
        for name in "ab":
            federation.worker(name, Frozen(federation.loop, 0.0))
        assert (await coordinator.end()).outcome == "finished"
        first, last = federation.weights(0), federation.weights(2)
        assert last["body/w"].tobytes() == first["body/w"].tobytes()
        assert np.all(last["head/w"] != 0)

    federated(scenario)
