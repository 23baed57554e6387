"""Personal models: how good they are is told beside how good the averaged model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner
from flax import nnx

import fluffle
from fluffle_coordinator.cli.history import history
from fluffle_coordinator.cli.journal import journal
from fluffle_coordinator.dashboard.report import read_report
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.scaffold import Scaffold

pytestmark = pytest.mark.usefixtures("compiled_elsewhere")


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.head(nnx.relu(self.norm(self.body(inputs))))[:, 0]


def hospital(seed: int, personal: Any) -> Any:
    """Return the task of a data owner whose targets are shifted by its own amount."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(40, 4)).astype(np.float32)
    targets = inputs.sum(axis=1) + 3 * seed
    return fluffle.flax_task(
        Net,
        lambda outputs, targets: (outputs - targets) ** 2,
        optax.sgd,
        (inputs[:30], targets[:30]),
        (inputs[30:], targets[30:]),
        learning_rate=0.02,
        metrics={"off": lambda outputs, targets: jnp.abs(outputs - targets)},
        federated=nnx.Not(nnx.PathContains(personal)),
        score_trained=True,
    )


@pytest.mark.parametrize("personal", ["head", "norm"])  # FedPer, FedBN
def test_the_personal_model_is_told_beside_the_averaged_one(personal, tmp_path):
    tasks = {name: hospital(seed, personal) for seed, name in enumerate(("north", "south"))}
    run = fluffle.simulate(tasks, rounds=3, epochs=3, batch_size=10, folder=tmp_path)
    columns = ("train_loss", "loss", "off", "personal_loss", "personal_off")
    assert sorted(run.history.columns) == sorted(columns)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    for line, one in zip([x for x in lines if x["event"] == "committed"], run.history, strict=True):
        scores = [each["metrics"]["personal_loss"] for each in line["participants"]]
        assert one.metrics["personal_loss"] == pytest.approx(np.mean(scores))
    table = CliRunner().invoke(history, [str(tmp_path)], env={"COLUMNS": "200"}).output
    assert "personal_loss" in table
    assert "personal_off" in json.dumps(read_report(tmp_path, 0.0))
    said = CliRunner().invoke(journal, ["--run", str(tmp_path), "--kind", "personal"]).output
    assert "round 3: before averaging, the workers' own models reached personal_loss " in said


def test_what_each_worker_measured_is_kept(tmp_path):
    tasks = {name: hospital(seed, "head") for seed, name in enumerate(("north", "south"))}
    run = fluffle.simulate(tasks, rounds=2, folder=tmp_path)
    for one in run.history:
        assert sorted(one.evaluations) == ["north", "south"]
        found = one.evaluations.values()
        assert [each.num_examples for each in found] == [10, 10]
        assert one.loss == pytest.approx(np.mean([each.loss for each in found]))
        assert one.metrics["off"] == pytest.approx(np.mean([e.metrics["off"] for e in found]))
    printed = CliRunner().invoke(history, [str(tmp_path), "--json"]).output
    first, _ = json.loads(printed)
    north = run.history[0].evaluations["north"]
    assert first["evaluations"][0] == {
        "worker": "north",
        "num_examples": 10,
        "loss": north.loss,
        "metrics": dict(north.metrics),
    }


def test_of_many_clients_only_those_that_were_asked_have_measured(tmp_path: Path):
    tasks = [hospital(seed % 3, "head") for seed in range(12)]
    run = fluffle.simulate(tasks, rounds=2, sample=3, folder=tmp_path)
    first, last = run.history
    assert len(first.evaluations) == 3, "the cohort of round 2 measured the model of round 1"
    assert set(first.evaluations) == set(last.participants)


@pytest.mark.parametrize(
    ("strategy", "rule", "personal"), [("fedavg", None, "head"), ("scaffold", Scaffold, "norm")]
)
def test_what_clients_keep_outlives_an_interruption_but_not_their_run(
    strategy, rule, personal, tmp_path
):
    def clients() -> dict[str, Any]:
        tasks = {name: hospital(seed, personal) for seed, name in enumerate(("north", "south"))}
        if rule is not None:
            for task in tasks.values():
                task.local_rule = BoundRule(rule())
        return tasks

    def simulated(tasks: dict[str, Any], folder: str, rounds: int, **options: Any) -> fluffle.Run:
        options |= {"strategy": strategy, "batch_size": 10, "select": "round-robin", "sample": 1}
        return fluffle.simulate(tasks, rounds=rounds, folder=tmp_path / folder, **options)

    same = clients()
    whole = simulated(same, "whole", 4)
    simulated(clients(), "interrupted", 2)
    continued = simulated(clients(), "interrupted", 4)
    again = simulated(same, "interrupted", 4, fresh=True)
    assert again.history["loss"] == whole.history["loss"]
    # The model of round 2, the last one for a while, was measured by all clients.
    assert continued.history["loss"][2:] == whole.history["loss"][2:]
    for other in (continued, again):
        for name, one in whole.weights.items():
            np.testing.assert_array_equal(other.weights[name], one)
