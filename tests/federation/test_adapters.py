"""A federation of models with adapters: only the adapters travel and are averaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

import fluffle
from fluffle_common.protocol.messages import Plan
from fluffle_worker.task import RoundPlan
from fluffle_worker.tasks.flax import flax_task

WIDE = 64
PLAN = Plan(epochs=2, batch_size=4)
FROZEN = nnx.All(nnx.PathContains("backbone"), nnx.Not(nnx.LoRAParam))


class Adapted(nnx.Module):
    """A frozen backbone of 64 by 64 with an adapter of rank 1 and a personal head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.backbone = nnx.LoRALinear(WIDE, WIDE, lora_rank=1, rngs=rngs)
        self.head = nnx.Linear(WIDE, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.head(self.backbone(inputs))[:, 0]


def adapted(seed: int, backbone: int = 0, **options: Any) -> Any:
    inputs = np.random.default_rng(seed).normal(size=(8, WIDE)).astype(np.float32)
    return flax_task(
        lambda rngs: pretrained(backbone) if backbone else Adapted(rngs),
        lambda outputs, targets: (outputs - targets) ** 2,
        optax.sgd(0.01),
        (inputs, inputs[:, seed]),
        federated=nnx.LoRAParam,
        frozen=FROZEN,
        **options,
    )


def pretrained(seed: int) -> Adapted:
    """Return a model with a backbone of its own, and the same adapters and head as any."""
    module, other = Adapted(nnx.Rngs(0)), Adapted(nnx.Rngs(seed))
    nnx.update(module, nnx.state(other, nnx.All(nnx.Param, FROZEN)))
    return module


def trained_alone(rounds: int) -> list[Any]:
    """Return the average after each round, computed without a federation."""
    tasks = [adapted(seed) for seed in (0, 1)]
    weights, averages = tasks[0].init(0), []
    for number in range(1, rounds + 1):
        plan = RoundPlan(
            **{**dict(PLAN), "seed": number, "run": "r", "round": number, "sequence": number}
        )
        ends = [task.train(weights, plan, lambda *_: None).weights for task in tasks]
        weights = {name: (ends[0][name] + ends[1][name]) / 2 for name in weights}
        averages.append(weights)
    return averages


@pytest.mark.usefixtures("compiled_elsewhere")
def test_only_adapters_travel_and_each_worker_keeps_its_own_head(federated):
    expected = trained_alone(2)
    tasks = [adapted(seed) for seed in (0, 1)]
    for task in tasks:  # compile now, because VirtualLoop allows no thread to take long
        task.train(task.init(0), PLAN, lambda *_: None)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, plan=PLAN)
        for name, task in zip("ab", tasks, strict=True):
            federation.worker(name, task)
        await coordinator.end()
        for number, weights in enumerate(expected, start=1):
            model = federation.weights(number)
            assert model.keys() == {"backbone/lora/lora_a", "backbone/lora/lora_b"}
            for name, array in model.items():
                np.testing.assert_allclose(array, weights[name], rtol=1e-4, atol=1e-6)
        # two adapters of 64 float32 each; the whole model has 16 KiB
        for line in federation.history():
            assert [one["bytes"] for one in line["participants"]] == [2 * 4 * WIDE] * 2

    federated(scenario)


@pytest.mark.usefixtures("compiled_elsewhere")
def test_one_backbone_serves_all_workers_if_it_is_shared(federated):
    tasks = [adapted(seed, 10 * seed, share_frozen=True) for seed in (0, 1)]
    for task in tasks:
        task.train(task.init(0), PLAN, lambda *_: None)
        task.keep_in(None)  # and forget the head that this has trained
    expected = trained_alone(2)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, plan=PLAN, min_workers=2)
        for name, task in zip("ab", tasks, strict=True):
            federation.worker(name, task)
        await coordinator.end()
        (sent,) = coordinator.log.of("frozen_sent")
        assert sent["workers"] == ["b"]
        for number, weights in enumerate(expected, start=1):
            found = federation.weights(number)
            for name, array in found.items():
                np.testing.assert_allclose(array, weights[name], rtol=1e-4, atol=1e-6)

    federated(scenario)


@pytest.mark.usefixtures("compiled_elsewhere")
def test_a_backbone_that_only_the_coordinator_has_reaches_the_workers_and_the_checkpoints(tmp_path):
    module = pretrained(99)
    start = tmp_path / "start.safetensors"
    fluffle.save_model(start, module, federated=nnx.LoRAParam, frozen=FROZEN)
    tasks = [adapted(seed, share_frozen=True) for seed in (0, 1)]
    done = fluffle.run(tasks, rounds=2, folder=tmp_path / "run", init=start, progress=False)
    kernel, checkpoint = "backbone/kernel", tmp_path / "run/round-0002.safetensors"
    for task in tasks:
        np.testing.assert_array_equal(task.frozen()[kernel], module.backbone.kernel[...])
    filled = Adapted(nnx.Rngs(5))
    head = np.asarray(filled.head.kernel[...])
    fluffle.load_into(filled, checkpoint, federated=nnx.LoRAParam)
    np.testing.assert_array_equal(filled.backbone.kernel[...], module.backbone.kernel[...])
    trained = done.weights["backbone/lora/lora_a"]
    np.testing.assert_array_equal(filled.backbone.lora.lora_a[...], trained)
    np.testing.assert_array_equal(filled.head.kernel[...], head)
    next((tmp_path / "run").glob("frozen-*")).unlink()
    lost = "frozen tensors cannot be read .*there is no model file .*; restore this file, or copy"
    with pytest.raises(fluffle.UsageError, match=lost):
        fluffle.load_into(filled, checkpoint, federated=nnx.LoRAParam)
    with pytest.raises(fluffle.RunError, match=f"{lost} .*, or start a new run with"):
        fluffle.run(tasks, rounds=3, folder=tmp_path / "run", progress=False)


@pytest.mark.usefixtures("compiled_elsewhere")
def test_another_backbone_cannot_begin_a_run_that_exists(tmp_path):
    start = tmp_path / "start.safetensors"
    for seed, rounds in ((99, 1), (98, 2)):
        fluffle.save_model(start, pretrained(seed), federated=nnx.LoRAParam, frozen=FROZEN)
        run = {"rounds": rounds, "folder": tmp_path / "run", "init": start, "progress": False}
        if rounds == 1:
            fluffle.run([adapted(0, share_frozen=True)], **run)
        else:
            with pytest.raises(fluffle.UsageError, match="conflicts with the existing run"):
                fluffle.run([adapted(0, share_frozen=True)], **run)


@pytest.mark.usefixtures("compiled_elsewhere")
def test_simulated_clients_share_a_backbone_too(tmp_path):
    start = tmp_path / "start.safetensors"
    fluffle.save_model(start, pretrained(99), federated=nnx.LoRAParam, frozen=FROZEN)
    task = adapted(0, share_frozen=True)
    fluffle.simulate(task, clients=3, rounds=2, folder=tmp_path / "run", init=start)
    expected = pretrained(99).backbone.kernel[...]
    np.testing.assert_array_equal(task.frozen()["backbone/kernel"], expected)


def test_a_task_that_shares_nothing_is_told_so():
    with pytest.raises(fluffle.TaskError, match="frozen= selects no tensor"):
        flax_task(
            Adapted,
            lambda outputs, targets: (outputs - targets) ** 2,
            optax.sgd(0.01),
            (np.zeros((2, WIDE), np.float32), np.zeros(2, np.float32)),
            share_frozen=True,
        )
