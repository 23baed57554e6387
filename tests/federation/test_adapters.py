"""A federation of models with adapters: only the adapters travel and are averaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from fluffle_common.protocol.messages import Plan
from fluffle_worker.task import RoundPlan
from fluffle_worker.tasks.flax import flax_task

WIDE = 64
PLAN = Plan(epochs=2, batch_size=4)


class Adapted(nnx.Module):
    """A frozen backbone of 64 by 64 with an adapter of rank 1 and a personal head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.backbone = nnx.LoRALinear(WIDE, WIDE, lora_rank=1, rngs=rngs)
        self.head = nnx.Linear(WIDE, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.head(self.backbone(inputs))[:, 0]


@pytest.fixture
def _compiled_elsewhere(tmp_path: Path) -> Iterator[None]:
    """Keep JAX's compiled code out of the user's cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def adapted(seed: int) -> Any:
    inputs = np.random.default_rng(seed).normal(size=(8, WIDE)).astype(np.float32)
    return flax_task(
        Adapted,
        lambda outputs, targets: (outputs - targets) ** 2,
        optax.sgd(0.01),
        (inputs, inputs[:, seed]),
        federated=nnx.LoRAParam,
        frozen=nnx.All(nnx.PathContains("backbone"), nnx.Not(nnx.LoRAParam)),
    )


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


@pytest.mark.usefixtures("_compiled_elsewhere")
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
