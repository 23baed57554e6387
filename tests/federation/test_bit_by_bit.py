"""Runs that are killed at every third round end bit for bit like undisturbed ones."""

from __future__ import annotations

import numpy as np
import pytest

from fluffle_common.tensors.checkpoint import checkpoint_name, read_whole
from fluffle_coordinator.strategy import dp_fedavg
from fluffle_coordinator.user_code.strategy_loading import load_strategy
from tests.federation.harness import Adder
from tests.federation.test_scaffold import TARGETS, Descent

ROUNDS = 9
EVERY = 3


def models(folder):
    """Return the tensors of each checkpoint as bytes: the model and the strategy's state."""
    checkpoints = [read_whole(folder / checkpoint_name(number)) for number in range(ROUNDS + 1)]
    return [
        {
            name: tensor.tobytes()
            for name, tensor in [*one.weights.items(), *one.strategy_state.items()]
        }
        for one in checkpoints
    ]


async def undisturbed(federation, strategy, start):
    federation.folder = federation.folder.with_name("undisturbed")
    coordinator = federation.coordinator(ROUNDS, strategy=load_strategy(strategy))
    start(federation)
    assert (await coordinator.end()).outcome == "finished"
    return models(federation.folder)


async def killed(federation, strategy, start, *, workers_too, when):
    """Kill the coordinator at every third round, and optionally all workers with it."""
    federation.folder = federation.folder.with_name("killed")
    workers = start(federation)
    for number in range(EVERY, ROUNDS, EVERY):
        coordinator = federation.coordinator(ROUNDS, strategy=load_strategy(strategy))
        while not any(line["round"] == number for line in coordinator.log.of(when)):
            await coordinator.log.until(when, len(coordinator.log.of(when)) + 1)
        await coordinator.kill()
        if workers_too:
            for worker in workers:
                await worker.kill()
                await worker.training.at_rest()  # else it would write beside its successor
            workers = start(federation)
    coordinator = federation.coordinator(ROUNDS, strategy=load_strategy(strategy))
    assert (await coordinator.end()).outcome == "finished"
    return models(federation.folder)


def both(federated, strategy, start, **how):
    results = {}

    async def first(federation):
        results["undisturbed"] = await undisturbed(federation, strategy, start)

    async def second(federation):
        results["killed"] = await killed(federation, strategy, start, **how)

    federated(first)
    federated(second)
    return results["undisturbed"], results["killed"]


def adders(federation):
    return [
        federation.worker("a", Adder(federation.loop, 0.1)),
        federation.worker("b", Adder(federation.loop, 0.3, num_examples=30)),
    ]


@pytest.mark.parametrize("when", ["opened", "counted", "committed"])
def test_fedadam(federated, when):
    whole, resumed = both(federated, "fedadam:lr=0.1", adders, workers_too=False, when=when)
    assert len(whole[-1]) == 4  # w, two moments, and the number of steps
    assert resumed == whole


@pytest.mark.parametrize("when", ["opened", "counted", "committed"])
def test_scaffold_with_killed_workers(federated, tmp_path, when):
    def start(federation):
        kept = tmp_path / federation.folder.name
        return [federation.worker(name, Descent(name), state_dir=kept / name) for name in TARGETS]

    whole, resumed = both(federated, "scaffold", start, workers_too=True, when=when)
    assert len({one["control/w"] for one in whole[1:]}) == ROUNDS  # it changes in every round
    assert resumed == whole


def test_adaptive_clipping(federated, monkeypatch):
    """Clip adaptively without noise, since noise would differ between the runs."""
    monkeypatch.setattr(dp_fedavg, "gaussian", np.zeros)
    strategy = "dp:clip=1,noise=0.5,workers=2,quantile=0.75+fedavgm:momentum=0.5"
    whole, resumed = both(federated, strategy, adders, workers_too=False, when="counted")
    assert len({one["mean/clip"] for one in whole[1:]}) == ROUNDS
    assert resumed == whole
