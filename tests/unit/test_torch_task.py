"""The PyTorch adapter: what travels, what a training computes, and what it refuses."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fluffle
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights, same_form
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.clip import Clip
from fluffle_worker.local.dp_sgd import DpSgd
from fluffle_worker.local.proximal import Proximal
from fluffle_worker.local.scaffold import Scaffold
from fluffle_worker.results import Results
from fluffle_worker.task import RoundPlan
from fluffle_worker.tasks.examples import index_batches

torch = pytest.importorskip("torch", reason="PyTorch is an optional dependency")

from torch import nn  # noqa: E402

from fluffle_worker.tasks import adapted  # noqa: E402
from fluffle_worker.tasks.examples import accuracy  # noqa: E402
from fluffle_worker.tasks.torch import TorchTask, torch_task  # noqa: E402

COUNT, FEATURES, RATE = 12, 3, 0.05


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, inputs: Any) -> Any:
        return self.linear(inputs)[:, 0]


class Normed(nn.Module):
    """A body, batch normalization, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 1)
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, inputs: Any) -> Any:
        self.calls += 1
        return self.head(self.dropout(self.norm(self.body(inputs))) * self.mask)[:, 0]


class Tied(nn.Module):
    """An encoder whose weights are also the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, FEATURES, bias=False)
        self.decoder = nn.Linear(FEATURES, FEATURES, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs: Any) -> Any:
        return self.decoder(torch.tanh(self.encoder(inputs)))


def squared(outputs: Any, targets: Any) -> Any:
    return (outputs - targets) ** 2


def numbers(seed: int = 0, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)
    return inputs, (inputs @ np.array([1, -2, 3], np.float32) + 1).astype(np.float32)


def task_of(model: Any = Line, **changes: Any) -> TorchTask:
    told = {
        "loss": squared,
        "optimizer": torch.optim.SGD,
        "train_data": numbers(),
        "learning_rate": RATE,
        "device": "cpu",
        **changes,
    }
    return torch_task(model, told.pop("loss"), **told)


def ignore(*_: object) -> None:
    pass


def train(task: TorchTask, weights: Weights, number: int = 1, **plan: Any) -> Weights:
    told = {"epochs": 2, "batch_size": 4, "run": "r"} | plan
    return task.train(weights, RoundPlan(round=number, sequence=number, **told), ignore).weights


def moved(one: Weights, other: Weights) -> list[str]:
    return sorted(name for name in one if not np.array_equal(one[name], other[name]))


def by_numpy(weights: Weights, batches: Iterator[Any], pull: float = 0.0) -> tuple[Any, Any]:
    """Train a line by SGD in float64; ``pull`` is the factor of FedProx."""
    inputs, targets = (part.astype(np.float64) for part in numbers())
    first = weights["linear.weight"][0].astype(np.float64), float(weights["linear.bias"][0])
    kernel, bias = first
    for batch in batches:
        wrong = inputs[batch] @ kernel + bias - targets[batch]
        slopes = 2 * (wrong[:, None] * inputs[batch]).mean(axis=0), 2 * wrong.mean()
        kernel, bias = (
            old - RATE * (slope + pull * (old - start))
            for old, slope, start in zip((kernel, bias), slopes, first, strict=True)
        )
    return kernel, bias


def check_line(found: Weights, expected: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(found["linear.weight"][0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found["linear.bias"][0], expected[1], rtol=1e-5)


def test_a_worker_with_torch_needs_no_jax():
    code = """if True:
        import sys, fluffle
        fluffle.torch_task, fluffle.accuracy
        assert not {"jax", "flax", "optax"} & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- what travels ------------------------------------------------------------------------------


def test_parameters_and_persistent_buffers_travel_under_the_names_of_the_state_dict():
    task = task_of(Normed)
    weights = task.init(0)
    assert weights.keys() == Normed().state_dict().keys() - {"mask"}
    assert weights["norm.num_batches_tracked"].dtype == np.int64
    same_form(weights, task.model_form())
    trained = task.train(weights, Plan(epochs=2, batch_size=4), ignore).weights
    same_form(trained, weights)
    assert moved(trained, weights) == sorted(weights)
    assert trained["norm.num_batches_tracked"] == 6
    module = Normed()
    module.load_state_dict(
        {name: torch.tensor(one) for name, one in trained.items()} | {"mask": module.mask}
    )


def test_first_weights_depend_on_the_seed_alone_and_leave_torchs_random_state():
    before = torch.random.get_rng_state()
    task = task_of(Normed)
    first, other = task.init(3), task.init(4)
    train(task, first)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert not moved(task_of(Normed).init(3), first)
    assert "body.weight" in moved(first, other)


def test_tied_weights_travel_once_and_stay_tied():
    inputs, _ = numbers()
    task = task_of(Tied, train_data=(inputs, inputs), valid_data=(inputs, inputs))
    weights = task.init(0)
    assert list(weights) == ["encoder.weight"]
    trained = train(task, weights)
    kernel = trained["encoder.weight"].astype(np.float64)
    expected = ((np.tanh(inputs @ kernel.T) @ kernel.T - inputs) ** 2).mean()
    assert task.evaluate(trained).loss == pytest.approx(expected, rel=1e-5)
    assert task.evaluate(trained).loss < task.evaluate(weights).loss


def test_weights_of_bfloat16_train_as_such():
    inputs = torch.from_numpy(numbers()[0]).bfloat16()
    data = inputs, torch.from_numpy(numbers()[1]).bfloat16()
    for rule in (None, Proximal(0.1)):
        task = task_of(lambda: Line().bfloat16(), train_data=data, valid_data=data, local_rule=rule)
        weights = task.init(0)
        assert {one.dtype for one in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
        trained = train(task, weights, epochs=8)
        same_form(trained, weights)
        assert task.evaluate(trained).loss < task.evaluate(weights).loss / 2


def test_what_was_received_is_left_as_it_was():
    task = task_of()
    weights = task.init(0)
    before = {name: one.copy() for name, one in weights.items()}
    received = {name: one.copy() for name, one in weights.items()}
    for one in received.values():
        one.flags.writeable = False  # as the worker lends them; torch warns about such arrays
    assert moved(train(task, received), before) == sorted(before)
    assert not moved(received, before)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda w: w | {"other": np.zeros(1)}, "unknown other"),
        (lambda w: w | {"linear.bias": np.zeros(2, np.float32)}, r"has shape \(2,\)"),
        (lambda w: w | {"linear.bias": np.zeros(1)}, "is float64; expected float32"),
    ],
)
def test_weights_of_another_form_are_refused(spoil, told):
    task = task_of(valid_data=numbers(1))
    weights = spoil(task.init(0))
    for use in (functools.partial(train, task), task.evaluate):
        with pytest.raises(ValueError, match=told):
            use(weights)


# --- filters -----------------------------------------------------------------------------------


def test_normalization_that_stays_at_home_is_trained_and_kept():
    """FedBN: Li et al., ICLR 2021."""

    def elsewhere(name: str) -> bool:
        return not name.startswith("norm.")

    task = task_of(Normed, valid_data=numbers(1), federated=elsewhere)
    weights = task.init(0)
    assert sorted(weights) == ["body.bias", "body.weight", "head.bias", "head.weight"]
    first = train(task, weights)
    kept = dict(task._personal.latest())
    assert len(kept) == 5
    assert kept["norm.num_batches_tracked"] == 6
    second = train(task, first, 2)
    assert moved(second, train(task_of(Normed, federated=elsewhere), first, 2))
    assert not moved(train(task, first, 2), second)  # as after a lost update
    assert not moved(train(task, weights, run="another"), first)


def test_personal_tensors_outlive_their_worker(tmp_path):
    def body(name: str) -> bool:
        return name.startswith("body.")

    task, alone = task_of(Normed, federated=body), task_of(Normed, federated=body)
    task.keep_in(tmp_path)
    first = train(task, task.init(0))
    train(alone, task.init(0))
    again = task_of(Normed, federated=body)
    again.keep_in(tmp_path)
    assert not moved(train(again, first, 2), train(alone, first, 2))


@pytest.mark.parametrize("by_filter", [True, False])
def test_a_frozen_backbone_neither_travels_nor_changes(by_filter):
    def still() -> nn.Module:
        module = Normed()
        module.body.requires_grad_(False)
        return module

    if by_filter:
        task = task_of(Normed, frozen=lambda name: name.startswith(("body.", "norm.running")))
    else:
        task = task_of(still)
    weights = task.init(5)
    assert not [name for name in weights if name.startswith("body.")]
    before = {name: one.copy() for name, one in task.frozen().items()}
    trained = train(task, weights)
    assert "head.weight" in moved(trained, weights)
    assert not moved(task.frozen(), before)
    assert not task._personal.latest()
    theirs = {name: one + 1 for name, one in before.items()}
    held = task.frozen()
    task.use_frozen(theirs)
    assert not moved(task.frozen(), theirs)
    assert not moved(held, before)
    assert moved(train(task, weights), trained)


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        (
            {"federated": False},
            "the model has no tensor left to send; .*of the model: body.weight, ",
        ),
        ({"frozen": True}, "the model has no tensor left to send"),
        ({"frozen": lambda name: "running" not in name}, "the model has no parameter left to tr"),
        ({"share_frozen": True}, "frozen= selects no tensor"),
    ],
)
def test_filters_that_leave_nothing_are_refused(filters, told):
    with pytest.raises(TaskError, match=told):
        task_of(Normed, **filters)


def test_a_data_loader_in_place_of_the_data_is_told_how_to_be_a_stream():
    rows = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4))
    loader = torch.utils.data.DataLoader(rows)
    with pytest.raises(TaskError, match=r"iter\(loader\)' .*num_examples=len\(loader.dataset\)"):
        task_of(train_data=loader)
    with pytest.raises(TaskError, match=r"valid_data is a DataLoader; .*batch_size=len\(dataset\)"):
        task_of(valid_data=loader)


def test_a_plan_may_train_a_part_of_the_model():
    task = task_of(Normed)
    weights = task.init(0)
    running = ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    trained = train(task, weights, train=("head.*",))
    assert moved(trained, weights) == ["head.bias", "head.weight", *running]
    assert "body.weight" in moved(train(task, weights), weights)
    with pytest.raises(TaskError, match=r"selects the tensors tail\.\*, but this task's model"):
        train(task, weights, train=("tail.*",))


@pytest.mark.parametrize("model", [Line(), lambda: "a line"])
def test_what_makes_no_module_is_refused(model):
    with pytest.raises(TaskError, match="expected a function that makes a module"):
        task_of(model)


def test_a_module_that_exists_gives_the_first_weights_and_is_not_trained():
    module = Line()
    before = module.linear.weight.detach().clone()
    task = task_of(lambda: module)
    weights = task.init(1)
    np.testing.assert_array_equal(weights["linear.weight"], before)
    train(task, weights)
    assert torch.equal(module.linear.weight, before)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_a_training_is_what_numpy_makes_of_it(pull):
    task = task_of(sample_seed=3, local_rule=Proximal(pull) if pull else None)
    weights, plan = task.init(0), Plan(epochs=4, batch_size=5, seed=9)
    told: list[tuple[int, int]] = []
    result = task.train(weights, plan, lambda *step: told.append(step[:2]))
    check_line(result.weights, by_numpy(weights, index_batches(plan, COUNT, 3), pull))
    assert told == [(step, 12) for step in range(1, 13)]
    assert (result.num_examples, result.metrics["steps"]) == (COUNT, 12)


def test_training_is_the_same_for_the_same_seed_although_dropout_is_random():
    task = task_of(Normed)
    weights = task.init(0)
    first = train(task, weights, seed=1)
    torch.rand(5)
    assert not moved(train(task, weights, seed=1), first)
    assert moved(train(task, weights, seed=2), first)
    other = task_of(Normed, sample_seed=1)
    assert moved(train(other, weights, seed=1), first)


def test_trainings_in_several_threads_do_not_disturb_each_other():
    tasks = [task_of(Normed, sample_seed=seed) for seed in range(3)]
    weights = tasks[0].init(0)
    alone = [train(task, weights, epochs=20) for task in tasks]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda task: train(task, weights, epochs=20), tasks))
    assert not [moved(*pair) for pair in zip(alone, together, strict=True) if moved(*pair)]


def test_the_plans_learning_rate_replaces_the_tasks_own():
    task = task_of()
    weights = task.init(0)
    steps = [
        train(task, weights, steps=1, batch_size=COUNT, **plan)["linear.bias"]
        - weights["linear.bias"]
        for plan in ({}, {"learning_rate": 2 * RATE})
    ]
    assert steps[1] == pytest.approx(2 * steps[0], rel=1e-5)


def test_what_progress_raises_stops_training_at_once_and_leaves_nothing_behind():
    task = task_of(Normed)
    weights = task.init(0)
    expected = train(task, weights)

    def stop(step: int, *_: object) -> None:
        if step == 2:
            raise RuntimeError("not wanted")

    with pytest.raises(RuntimeError, match="not wanted"):
        task.train(weights, Plan(epochs=9, batch_size=4), stop)
    assert not moved(train(task, weights), expected)


def test_augmentation_changes_training_only_and_differs_from_step_to_step():
    seen: list[Any] = []

    def noisy(inputs: Any) -> Any:
        seen.append(torch.randn(1).item())
        return inputs + seen[-1]

    task, plain = (task_of(valid_data=numbers(1), augment=one) for one in (noisy, None))
    weights = task.init(0)
    first = train(task, weights)
    assert len(set(seen)) == 6
    assert not moved(train(task, weights), first)
    assert task.evaluate(weights) == plain.evaluate(weights)


# --- data --------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A model of two named inputs; the mask selects features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, values: Any, mask: Any) -> Any:
        return self.linear(values * mask)[:, 0]


def test_several_inputs_come_by_their_names_or_in_their_order():
    inputs, targets = numbers()
    mask = (np.random.default_rng(5).random(inputs.shape) < 0.5).astype(np.float32)
    plain = task_of(train_data=(inputs * mask, targets), valid_data=(inputs * mask, targets))
    weights = plain.init(0)
    expected = train(plain, weights)
    for given in ({"mask": mask, "values": inputs}, (inputs, torch.from_numpy(mask))):
        task = task_of(Masked, train_data=(given, targets), valid_data=(given, targets))
        trained = train(task, weights)
        for name in expected:
            np.testing.assert_allclose(trained[name], expected[name], rtol=1e-6)
        assert task.evaluate(weights).loss == pytest.approx(plain.evaluate(weights).loss)


@pytest.mark.parametrize("steps", [None, 1, 5])
def test_a_stream_is_trained_as_the_arrays_that_it_comes_from(steps):
    inputs, targets = numbers()

    def batches(epoch: int, rng: np.random.Generator) -> Iterator[Any]:
        order = rng.permutation(COUNT)
        for start in range(0, COUNT, 5):  # 5, 5 and 2
            chosen = order[start : start + 5]
            yield inputs[chosen], torch.from_numpy(targets[chosen])

    def order() -> Iterator[Any]:
        for epoch in (0, 1):
            order = np.random.default_rng([7, 0, epoch]).permutation(COUNT)
            yield from (order[start : start + 5] for start in range(0, COUNT, 5))

    task = task_of(train_data=batches, num_examples=COUNT)
    weights, told = task.init(0), list[tuple[int, int]]()
    plan = Plan(epochs=2, steps=steps, batch_size=5, seed=7)
    result = task.train(weights, plan, lambda *step: told.append(step[:2]))
    count = steps or 6
    assert told == [(step, count) for step in range(1, count + 1)]
    check_line(result.weights, by_numpy(weights, iter(list(order())[:count])))


def test_a_data_loader_that_shuffles_is_a_reproducible_stream():
    inputs, targets = map(torch.from_numpy, numbers())
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=4, shuffle=True
    )
    task = task_of(train_data=lambda epoch, rng: iter(loader), num_examples=COUNT)
    weights = task.init(0)
    first = train(task, weights, seed=1)
    assert not moved(train(task, weights, seed=1), first)
    assert moved(train(task, weights, seed=2), first)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train_data": lambda epoch, rng: iter(())}, "give num_examples="),
        ({"train_data": lambda epoch, rng: iter(()), "num_examples": 5}, "no batch in epoch 0"),
        (
            {"train_data": (numbers()[0], numbers(0, 11)[1])},
            r"train_data have .* examples \(11, 12\)",
        ),
        (
            {"valid_data": (numbers()[0], numbers(0, 11)[1])},
            r"valid_data have .* examples \(11, 12\)",
        ),
    ],
)
def test_data_of_no_use_are_refused(data, told):
    with pytest.raises(TaskError, match=told):
        train(task_of(**data), task_of().init(0))


def test_an_evaluation_is_numpys_mean_over_the_examples():
    inputs, targets = numbers(2, 600)

    def spread(outputs: Any, targets: Any) -> Any:
        return torch.var(outputs - targets, correction=0)

    task = task_of(loss=spread, valid_data=(inputs, targets), metrics={"mse": squared})
    weights = task.init(0)
    wrong = inputs @ weights["linear.weight"][0] + weights["linear.bias"] - targets
    parts = [wrong[start : start + 256] for start in range(0, 600, 256)]
    found = task.evaluate(weights)
    assert found.num_examples == 600
    expected = sum(len(part) * part.var() for part in parts) / 600
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.metrics["mse"] == pytest.approx((wrong**2).mean(), rel=1e-5)
    assert task_of().evaluate(weights) is None


def test_evaluation_uses_the_received_statistics_and_no_dropout():
    task = task_of(Normed, valid_data=numbers(1))
    weights = task.init(0)
    before = task.evaluate(weights)
    assert task.evaluate(weights) == before
    other = weights | {"norm.running_mean": weights["norm.running_mean"] + 1}
    assert task.evaluate(other).loss != before.loss


def test_the_trained_model_is_scored_beside_the_received_one():
    task = task_of(
        Normed,
        federated=lambda name: not name.startswith("head."),
        valid_data=numbers(1),
        metrics={"off": lambda outputs, targets: (outputs - targets).abs()},
        score_trained=True,
    )
    result = task.train(task.init(0), RoundPlan(epochs=2, batch_size=4, round=1), ignore)
    found = task.evaluate(result.weights)  # with the head that was trained with them
    assert result.metrics["personal_loss"] == pytest.approx(found.loss)
    assert result.metrics["personal_off"] == pytest.approx(found.metrics["off"])


def test_accuracy_is_of_any_framework():
    outputs, targets = np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([1, 1])
    assert accuracy(outputs, targets).tolist() == [1.0, 0.0]
    found = accuracy(torch.from_numpy(outputs), torch.from_numpy(targets))
    assert found.tolist() == [1.0, 0.0]


# --- local rules -------------------------------------------------------------------------------


def test_a_clipped_step_has_the_length_of_the_norm():
    for norm in (0.5, 0.25):
        task = task_of(local_rule=Clip(norm))
        weights = task.init(0)
        trained = train(task, weights, steps=1, batch_size=COUNT, learning_rate=1.0)
        length = np.sqrt(sum(((trained[n] - weights[n]) ** 2).sum() for n in weights))
        assert length == pytest.approx(norm, rel=1e-5)


def test_a_control_variate_is_the_mean_gradient_of_the_training():
    task = task_of(local_rule=Scaffold())
    weights = task.init(0)
    zeros = {name: np.zeros_like(one) for name, one in weights.items()}
    task.local_rule.of_work(("r", 1, 1), zeros)
    trained = train(task, weights)
    for name, sent in task.local_rule.sent.items():
        expected = (weights[name] - trained[name]) / (6 * RATE)
        np.testing.assert_allclose(sent, expected, rtol=1e-4, atol=1e-6)


def test_a_rule_may_keep_what_it_was_given_and_sees_unused_parameters():
    class Remembers:
        def begin(self, received: Any, broadcast: Any, kept: Any) -> Any:
            return [received]

        def gradient(self, gradient: Any, weights: Any, state: Any) -> Any:
            return gradient, [*state, weights]

        def end(self, trained: Any, state: Any) -> Any:
            seen = [one["linear.bias"].item() for one in state]
            assert len(set(seen)) == len(seen) - 1  # the first weights are the received ones
            assert not state[0]["unused"].any()
            return {}

    class WithMore(Line):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(2))

    task = task_of(WithMore, local_rule=Remembers())
    weights = task.init(0)
    assert moved(train(task, weights), weights) == ["linear.bias", "linear.weight"]


def test_dp_sgd_without_noise_or_clipping_is_sgd_and_tells_no_loss():
    pytest.importorskip("jax")
    task, plain = task_of(local_rule=DpSgd(1e9, 0.0)), task_of()
    weights, told = task.init(0), list[Any]()
    plan = Plan(epochs=2, batch_size=4)
    result = task.train(weights, plan, lambda *step: told.append(step[2]))
    assert set(result.metrics) == {"steps"}
    assert told == [None] * 6
    expected = plain.train(weights, plan, ignore).weights
    for name in weights:
        np.testing.assert_allclose(result.weights[name], expected[name], rtol=1e-5)


def test_no_example_moves_a_private_training_by_more_than_its_share():
    pytest.importorskip("jax")
    inputs, targets = numbers()
    far = targets.copy()
    far[0] = 1e6
    ends = []
    for data in ((inputs, targets), (inputs, far)):
        task = task_of(train_data=data, local_rule=DpSgd(0.1, 0.0), learning_rate=1.0)
        ends.append(train(task, task_of().init(0), steps=1, batch_size=COUNT))
    moves = sum(((ends[0][name] - ends[1][name]) ** 2).sum() for name in ends[0])
    assert np.sqrt(moves) <= 2 * 0.1 / COUNT * 1.001


def test_dp_sgd_refuses_batch_normalization():
    task = task_of(Normed)
    task.local_rule = BoundRule(DpSgd(1.0, 1.0))
    with pytest.raises(TaskError, match="batch normalization mixes the examples of a batch"):
        train(task, task.init(0))


def test_dp_sgd_without_jax_says_what_brings_it(monkeypatch):
    task = task_of(local_rule=DpSgd(1.0, 1.0))
    monkeypatch.setitem(sys.modules, "jax", None)  # as if it were not installed
    with pytest.raises(TaskError, match=r"needs JAX for its noise.*'fluffle\[worker\]'"):
        train(task, task.init(0))


def test_a_part_has_its_own_examples_and_shares_the_rest():
    task = task_of(valid_data=numbers(1))
    np.testing.assert_array_equal(task.labels, numbers()[1])
    part, rows = task.part(np.array([1, 5, 7]), 2), np.array([1, 5, 7])
    assert (part.num_examples, part.whole, part.evaluate(task.init(0))) == (3, task, None)
    inputs, targets = numbers()
    alone = task_of(train_data=(inputs[rows], targets[rows]), sample_seed=2)
    weights = task.init(0)
    assert not moved(train(part, weights), train(alone, weights))
    np.testing.assert_array_equal(part.part(np.array([2]), 0).labels, targets[[7]])


# --- model files -------------------------------------------------------------------------------


def test_a_model_file_fills_a_module_of_torch(tmp_path):
    task, file = task_of(Normed), tmp_path / "model.safetensors"
    weights = train(task, task.init(1))
    trained, module = Normed(), Normed()
    fluffle.load_into(trained, weights)
    fluffle.save_model(file, trained)
    loaded = fluffle.load_model(file)
    assert loaded.keys() == weights.keys()
    assert not moved(loaded, weights)
    fluffle.load_into(module, file)
    assert torch.equal(module.norm.running_var, torch.tensor(weights["norm.running_var"]))
    assert module.norm.num_batches_tracked == 6
    del loaded["norm.running_var"]
    with pytest.raises(
        fluffle.UsageError, match=r"Normed does not fit the model: .* unknown norm\.running_var$"
    ):
        fluffle.load_into(module, loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parameters_of_a_module_fill_another(dtype):
    one, other = Line().to(dtype), Line().to(dtype)
    fluffle.load_into(other, dict(one.named_parameters()))  # which need a gradient
    assert torch.equal(one.linear.weight, other.linear.weight)


def test_frozen_tensors_go_to_a_file_of_their_own(tmp_path):
    def body(name: str) -> bool:
        return name.startswith("body.")

    file, module, other = tmp_path / "start.safetensors", Normed(), Normed()
    fluffle.save_model(file, module, frozen=body)
    assert not [name for name in fluffle.load_model(file) if body(name)]
    fluffle.load_into(other, file, federated=lambda name: not body(name))
    assert torch.equal(other.body.weight, module.body.weight)


def headed() -> Normed:
    """Return a module whose body is not trained."""
    module = Normed()
    module.body.requires_grad_(False)
    return module


def test_a_model_file_has_the_tensors_that_a_task_sends(tmp_path):
    file, module = tmp_path / "start.safetensors", headed()
    fluffle.save_model(file, module)
    assert fluffle.load_model(file).keys() == task_of(headed).init(1).keys()
    other = headed()
    fluffle.load_into(other, file)
    assert torch.equal(other.head.weight, module.head.weight)


def test_a_model_without_its_frozen_parameters_fills_a_module():
    task, module = task_of(headed), headed()
    weights, body = train(task, task.init(1)), module.body.weight.clone()
    assert not [name for name in weights if name.startswith("body.")]
    fluffle.load_into(module, weights)
    assert torch.equal(module.head.weight, torch.tensor(weights["head.weight"]))
    assert torch.equal(module.body.weight, body)
    del weights["head.weight"]
    with pytest.raises(fluffle.UsageError, match=r"unknown head\.weight$"):
        fluffle.load_into(module, weights)
    whole = task_of(Normed).init(1)
    fluffle.load_into(module, whole)
    assert torch.equal(module.body.weight, torch.tensor(whole["body.weight"]))
    del whole["body.weight"]
    with pytest.raises(fluffle.UsageError, match=r"unknown body\.weight$"):
        fluffle.load_into(module, whole)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Any text is true, so it would select all tensors: those of a private head, too.
        (
            {"federated": "linear.weight"},
            "federated= is 'linear.weight'; expected True, False, or a func",
        ),
        ({"federated": ["linear.weight"]}, r"federated= is \['linear.weight'\]; expected True"),
        ({"frozen": "linear.weight"}, "frozen= is 'linear.weight'; expected True, False, or a"),
        ({"frozen": lambda name: "body" in name}, "frozen= selects no tensor; change the filter"),
        ({"optimizer": None}, "optimizer= is None; expected an optimizer's class, such as torch"),
        ({"loss": None}, "loss= is None; expected a function of the outputs and targets"),
        ({"learning_rate": "0.1"}, "learning_rate= is '0.1'; expected a number"),
        ({"train_data": numbers()[0]}, "train_data is of type ndarray; expected a pair"),
        ({"model": Lazy}, "tensor 'linear.weight' of the model has no shape .* call the module"),
    ],
)
def test_an_unusable_argument_is_named(changes: dict[str, Any], message: str):
    given: dict[str, Any] = {"model": Line, "loss": squared, "optimizer": torch.optim.SGD}
    with pytest.raises(TaskError, match=message):
        torch_task(**({**given, "train_data": numbers()} | changes))


def test_a_loss_that_is_no_tensor_is_named():
    task = torch_task(Line, lambda outputs, targets: 0.5, torch.optim.SGD, numbers())
    with pytest.raises(TaskError, match="loss= returned 0.5; expected a tensor"):
        task.train(task.init(0), Plan(), lambda *_: None)


def test_a_metric_that_is_one_number_is_of_all_held_out_examples(monkeypatch):
    monkeypatch.setattr(adapted, "EVALUATION_BATCH", 4)

    def median(outputs: Any, targets: Any) -> Any:
        return np.median((outputs - targets).numpy())

    def of_many(outputs: Any, targets: Any) -> Any:
        assert len(outputs) > 4, "as if a batch had only one class"
        return median(outputs, targets)

    inputs, targets = numbers()
    task = torch_task(
        Line,
        squared,
        torch.optim.SGD,
        numbers(),
        (inputs, targets),
        metrics={"median": median, "of_many": of_many},
    )
    weights = task.init(0)
    module = Line()
    fluffle.load_into(module, weights)
    with torch.no_grad():
        expected = median(module(torch.tensor(inputs)), torch.tensor(targets))
    found = task.evaluate(weights).metrics
    assert found == {"median": pytest.approx(expected), "of_many": pytest.approx(expected)}


def test_a_metric_that_fails_costs_no_other():
    def fails(outputs: Any, targets: Any) -> Any:
        raise ZeroDivisionError("no positives")

    metrics = {"auc": fails, "one": lambda outputs, targets: torch.ones(len(targets))}
    task = torch_task(Line, squared, torch.optim.SGD, numbers(), numbers(), metrics=metrics)
    weights, notes = task.init(0), []
    result = Results(notes.append).evaluated(lambda: task.evaluate(weights))
    assert result is not None
    assert (result.num_examples, result.metrics) == (COUNT, {"one": 1.0})
    (note,) = notes
    assert note.startswith("the metric 'auc' of evaluate() failed, so it is omitted: ZeroDiv")
