"""Federations of models with batch normalization under server steps: variances stay variances."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import save_file

import fluffle
from fluffle_common.errors import RefusedError, TaskError
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.wire_format import decode, read_groups
from fluffle_common.tensors.checkpoint import (
    checkpoint_name,
    names_in,
    read_checkpoint,
    read_whole,
)
from fluffle_common.tensors.weights import Weights
from fluffle_coordinator.cli.run_folder import replay
from fluffle_coordinator.storage.update_archive import read_update, update_path
from fluffle_coordinator.user_code.strategy_loading import load_strategy
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.dp_sgd import DpSgd
from tests.federation.harness import Adder

pytestmark = pytest.mark.usefixtures("compiled_elsewhere")
ROUNDS = 5
OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 8}
STRATEGIES = ["fedavgm:momentum=0.95", "fedadam:lr=0.3"]


def examples(seed: int) -> tuple[Any, Any]:
    """Return inputs whose variances are far from 1, the first value of running variances."""
    rng = np.random.default_rng(seed)
    inputs = (0.01 + 0.1 * seed) * rng.normal(size=(20 + 10 * seed, 3)).astype(np.float32)
    return inputs, inputs.sum(axis=1).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.head(self.norm(inputs))[:, 0]


@functools.cache  # because compiling them takes the longest
def flax_tasks() -> dict[str, Any]:
    def task(seed: int) -> Any:
        data = examples(seed)
        loss = lambda outputs, targets: (outputs - targets) ** 2  # noqa: E731
        return fluffle.flax_task(Net, loss, optax.sgd, data, data, learning_rate=0.01)

    return {"north": task(0), "south": task(1)}


@functools.cache
def torch_tasks() -> dict[str, Any]:
    torch = pytest.importorskip("torch", reason="PyTorch is an optional dependency")
    torch.set_num_threads(1)  # on a busy machine, its threads wait for each other
    nn = torch.nn

    def net() -> Any:
        return nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1), nn.Flatten(0))

    def task(seed: int) -> Any:
        data = examples(seed)
        loss = nn.functional.mse_loss
        return fluffle.torch_task(
            net, loss, torch.optim.SGD, data, data, learning_rate=0.01, device="cpu"
        )

    return {"north": task(0), "south": task(1)}


FRAMEWORKS = {
    "flax": (flax_tasks, {"norm/mean", "norm/var"}),
    "torch": (torch_tasks, {"0.running_mean", "0.running_var", "0.num_batches_tracked"}),
}


def averaged(folder: Path, number: int, base: Weights, names: set[str]) -> dict[str, Any]:
    """Return the mean of these tensors by examples, in float64, from a round's archived updates."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    (line,) = [x for x in lines if x["event"] == "committed" and x["round"] == number]
    total = {name: np.zeros(base[name].shape) for name in names}
    for place, who in enumerate(line["participants"], start=1):
        body, _ = read_update(update_path(folder, number, place, who["worker"]))
        message, payload = decode(body)
        assert isinstance(message, Update)
        delta = read_groups(message.tensors, payload)["model"]
        for name in names:
            total[name] += who["num_examples"] * delta[name].astype(np.float64)
    examples = sum(who["num_examples"] for who in line["participants"])
    means = {name: base[name] + total[name] / examples for name in names}
    return {n: np.rint(mean) if base[n].dtype.kind == "i" else mean for n, mean in means.items()}


def check_rounds(folder: Path, names: set[str], rounds: int = ROUNDS) -> None:
    """Check the statistics of every round, that every checkpoint names them, and every replay."""
    for number in range(1, rounds + 1):
        base, _ = read_checkpoint(folder / checkpoint_name(number - 1))
        found = read_whole(folder / checkpoint_name(number))
        assert set(names_in(found.metadata, "statistics")) == names
        assert not [n for n in found.strategy_state if n.removeprefix("second/") in names]
        for name, mean in averaged(folder, number, base, names).items():
            np.testing.assert_allclose(found.weights[name], mean, rtol=1e-6, err_msg=name)
            assert not name.endswith("var") or (found.weights[name] > 0).all()
        shown = CliRunner().invoke(replay, [str(folder), "--round", str(number)])
        assert (shown.exit_code, "equal: all" in shown.output) == (0, True), shown.output


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_variances_are_the_mean_of_the_workers_ones(framework, strategy, tmp_path):
    tasks, names = FRAMEWORKS[framework]
    options = OPTIONS | {"strategy": strategy, "keep_updates": True}
    whole = fluffle.run(tasks(), rounds=ROUNDS, folder=tmp_path / "whole", **options)
    check_rounds(tmp_path / "whole", names)
    assert np.isfinite(whole.history["loss"]).all()
    fluffle.run(tasks(), rounds=2, folder=tmp_path / "again", **options)
    again = fluffle.run(tasks(), rounds=ROUNDS, folder=tmp_path / "again", **options)
    simulated = fluffle.simulate(tasks(), rounds=ROUNDS, folder=tmp_path / "sim", **options)
    for other in (again, simulated):
        for name, tensor in whole.weights.items():
            np.testing.assert_array_equal(other.weights[name], tensor, err_msg=name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_new_run_learns_them_from_the_file_that_it_begins_with(framework, tmp_path):
    tasks, names = FRAMEWORKS[framework]
    options = OPTIONS | {"strategy": STRATEGIES[0], "keep_updates": True}
    first = fluffle.run(tasks(), rounds=1, folder=tmp_path / "first", **options)
    checkpoint = tmp_path / "first" / checkpoint_name(1)
    saved, plain = tmp_path / "saved.safetensors", tmp_path / "plain.safetensors"
    if framework == "flax":
        module = Net(nnx.Rngs(0))
    else:
        torch = pytest.importorskip("torch")
        module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    fluffle.load_into(module, checkpoint)
    fluffle.save_model(saved, module)
    save_file({n: np.array(t) for n, t in first.weights.items()}, plain)
    for number, file in enumerate((checkpoint, saved)):
        folder = tmp_path / str(number)
        fluffle.run(tasks(), rounds=2, folder=folder, init=file, **options)
        check_rounds(folder, names, 2)
    with pytest.raises(RefusedError) as refused:
        fluffle.run(tasks(), rounds=1, init=plain, **options)
    reason = str(refused.value)
    assert f"statistics: {len(names)} tensors, but the federation's model has" in reason
    assert "fluffle.save_model writes a file that names the model's statistics" in reason
    save_file(
        {n: np.array(t) for n, t in first.weights.items()},
        plain,
        {"statistics": json.dumps(sorted(names))},
    )
    fluffle.run(tasks(), rounds=1, init=plain, **options)


def test_a_file_that_names_others_is_refused_in_one_line(tmp_path):
    file = tmp_path / "start.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, file, {"statistics": '["mean"]'})
    with pytest.raises(fluffle.UsageError, match="cannot be used .* include 'mean', which is no"):
        fluffle.run(flax_tasks(), rounds=1, init=file)


class Normed(Adder):
    """A task in plain NumPy, whose ``var`` goes halfway to ``value`` and is a statistic."""

    statistics = ("var",)

    def init(self, seed: int) -> Weights:
        return {"w": np.zeros(2, np.float32), "var": np.full(2, 8.0, np.float32)}

    def train(self, weights: Weights, plan: Any, progress: Any) -> Any:
        result = super().train(weights, plan, progress)
        var = (weights["var"] + np.float32(self.value)) / 2
        return fluffle.TrainResult({**result.weights, "var": var}, result.num_examples)


def test_a_killed_coordinator_goes_on_with_the_same_variances_bit_for_bit(federated):
    strategy, folders = load_strategy("fedadam:lr=0.5"), []

    def workers(federation: Any) -> None:
        federation.worker("a", Normed(federation.loop, 0.5))
        federation.worker("b", Normed(federation.loop, 1.5, num_examples=30))

    async def whole(federation):
        federation.folder = federation.folder.with_name("whole")
        folders.append(federation.folder)
        coordinator = federation.coordinator(6, strategy=strategy, keep_updates=True)
        workers(federation)
        await coordinator.end()

    async def killed(federation):
        federation.folder = federation.folder.with_name("killed")
        folders.append(federation.folder)
        workers(federation)
        for when in ("first_weights", "committed", "opened"):
            coordinator = federation.coordinator(6, strategy=strategy, keep_updates=True)
            await coordinator.log.until(when, 2 if when == "committed" else 1)
            await coordinator.kill()
        await federation.coordinator(6, strategy=strategy, keep_updates=True).end()

    federated(whole)
    federated(killed)
    for folder in folders:
        check_rounds(folder, {"var"}, 6)
    for number in range(7):
        one, other = (read_checkpoint(folder / checkpoint_name(number))[0] for folder in folders)
        np.testing.assert_allclose(one["var"], other["var"], rtol=1e-6)
    expected = 8.0
    for number in range(1, 7):
        expected = (expected + 1.25) / 2  # (10 · 0.5 + 30 · 1.5) / 40
        found, _ = read_checkpoint(folders[0] / checkpoint_name(number))
        np.testing.assert_allclose(found["var"], expected, rtol=1e-6)


def test_a_worker_that_states_others_is_refused_in_words(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(2, number=2)
        federation.worker("a", Normed(federation.loop))
        federation.worker("b", Normed(federation.loop))
        await coordinator.log.until("opened")
        none = Normed(federation.loop)
        none.statistics = ()
        with pytest.raises(RefusedError, match="float32 2, but the .*; statistics: 1 tensor; that"):
            await federation.worker("c", none).end()
        await coordinator.end()

    federated(scenario)


def test_names_that_the_model_lacks_end_the_worker_when_it_starts(federated):
    async def scenario(federation):
        task = Normed(federation.loop)
        task.statistics = ("var", "mean")
        with pytest.raises(TaskError, match=r"include 'mean', which is not .*; correct the task's"):
            federation.worker("a", task)

    federated(scenario)


def test_nothing_without_noise_is_sent_under_dp_sgd(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(1, number=1)
        started = {}
        for name, value in (("leaks", 1.0), ("silent", 8.0)):  # 8 is what the variances are already
            task = Normed(federation.loop, value, size=2)
            task.local_rule = BoundRule(DpSgd(1.0, 1.0))
            started[name] = federation.worker(name, task)
        assert (await coordinator.end()).outcome == "finished"
        (participant,) = federation.history()[0]["participants"]
        assert participant["worker"] == "silent"
        (failure,) = started["leaks"].log.of("failure")
        assert "the local rule DpSgd changes only gradients, but training also" in failure["reason"]
        assert "'var', which has no gradient and would be sent as it is" in failure["reason"]

    federated(scenario)
