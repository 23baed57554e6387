"""Federated, personal and frozen parts of a Flax model, and the forms of its data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.clip import Clip
from fluffle_worker.local.dp_sgd import DpSgd
from fluffle_worker.local.scaffold import Scaffold
from fluffle_worker.task import RoundPlan
from fluffle_worker.tasks import adapted
from fluffle_worker.tasks.flax import FlaxTask, flax_task

COUNT, FEATURES = 12, 3


pytestmark = pytest.mark.usefixtures("compiled_elsewhere")


class Adapted(nnx.Module):
    """A backbone with a low-rank adapter and a bias."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.backbone = nnx.LoRALinear(FEATURES, 1, lora_rank=2, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.backbone(inputs)[:, 0]


class Normed(nnx.Module):
    """A body, batch normalization and a head."""

    traces = 0

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body = nnx.Linear(FEATURES, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        Normed.traces += 1
        return self.head(self.norm(self.body(inputs)))[:, 0]


class Scaled(nnx.Module):
    """A line and a scale, as two layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(FEATURES, 1, rngs=rngs)
        self.head = nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.head(self.linear(inputs))[:, 0]


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(FEATURES, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.linear(inputs)[:, 0]


def squared(outputs: Any, targets: Any) -> Any:
    return (outputs - targets) ** 2


def numbers(seed: int = 0, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)
    return inputs, (inputs @ np.array([1, -2, 3], np.float32) + 1).astype(np.float32)


def task_of(model: Any, **changes: Any) -> FlaxTask:
    told = {"optimizer": optax.sgd, "train_data": numbers(), "learning_rate": 0.05} | changes
    return flax_task(model, told.pop("loss", squared), **told)


def train(task: FlaxTask, weights: Weights, number: int = 1, **plan: Any) -> Weights:
    told = {"epochs": 2, "batch_size": 4, "run": "r"} | plan
    return task.train(
        weights, RoundPlan(round=number, sequence=number, **told), lambda *_: None
    ).weights


def moved(one: Weights, other: Weights) -> list[str]:
    return [name for name in one if not np.array_equal(one[name], other[name])]


class Shifted(Line):
    """A line whose inputs are shifted by an array that is not a variable."""

    def __init__(self, rngs: nnx.Rngs, hold: Any) -> None:
        super().__init__(rngs)
        self.held = hold(jnp.full(FEATURES, 0.5))

    def __call__(self, inputs: Any) -> Any:
        return super().__call__(inputs + jax.tree.leaves(self.held)[0])


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        nnx.data,
        lambda array: nnx.data({"shift": array}),
        lambda array: nnx.data([array]),
    ],
)
def test_an_array_outside_of_a_variable_is_a_constant_of_the_model(hold: Any) -> None:
    inputs, targets = numbers()
    plain = task_of(Line, train_data=(inputs + 0.5, targets), valid_data=(inputs + 0.5, targets))
    task = task_of(lambda rngs: Shifted(rngs, hold), valid_data=(inputs, targets))
    weights = task.init(1)
    assert not moved(weights, plain.init(1))
    expected = train(plain, weights)
    for name, one in train(task, weights).items():
        np.testing.assert_allclose(one, expected[name], rtol=1e-6)
    assert task.evaluate(weights).loss == pytest.approx(plain.evaluate(weights).loss)


# --- what travels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters",
    [
        {"frozen": nnx.Not(nnx.LoRAParam)},
        {"federated": nnx.LoRAParam, "frozen": nnx.Not(nnx.LoRAParam)},
    ],
)
def test_of_an_adapted_model_only_the_adapters_travel_and_train(filters):
    task = task_of(Adapted, valid_data=numbers(1), **filters)
    weights = task.init(3)
    assert {name: one.shape for name, one in weights.items()} == {
        "backbone/lora/lora_a": (FEATURES, 2),
        "backbone/lora/lora_b": (2, 1),
    }
    frozen = jax.tree.map(np.asarray, task._parts.at_home.frozen)
    trained = train(task, weights, epochs=6)
    assert trained.keys() == weights.keys()
    assert moved(trained, weights)
    kernel = Adapted(nnx.Rngs(0)).backbone.kernel.get_value()
    inputs, targets = numbers(1)
    product = trained["backbone/lora/lora_a"] @ trained["backbone/lora/lora_b"]
    expected = ((inputs @ (np.asarray(kernel) + product))[:, 0] - targets) ** 2
    assert task.evaluate(trained).loss == pytest.approx(expected.mean(), rel=1e-4)
    assert task.evaluate(trained).loss < task.evaluate(weights).loss
    jax.tree.map(np.testing.assert_array_equal, frozen, task._parts.at_home.frozen)


def test_normalization_that_stays_at_home_is_trained_and_kept():
    """FedBN: Li et al., ICLR 2021."""
    task = task_of(Normed, valid_data=numbers(1), federated=nnx.Not(nnx.PathContains("norm")))
    weights = task.init(0)
    assert sorted(weights) == ["body/bias", "body/kernel", "head/bias", "head/kernel"]
    first = train(task, weights)
    kept = dict(task._personal.latest())
    assert sorted(kept) == ["norm/bias", "norm/mean", "norm/scale", "norm/var"]
    fresh = task_of(Normed, federated=nnx.Not(nnx.PathContains("norm")))
    assert moved(train(task, first, 2), train(fresh, first, 2))  # it went on from what it kept
    assert moved(dict(task._personal.latest()), kept)


def test_a_personal_head_lives_as_long_as_its_run_and_a_repeated_round_begins_as_before():
    """FedPer: Arivazhagan et al., 2019."""
    task = task_of(Normed, federated=nnx.PathContains("body"))
    weights = task.init(0)
    first = train(task, weights, 1)
    second = train(task, weights, 2)
    assert moved(first, second)
    assert not moved(train(task, weights, 2), second)  # as after a lost update
    assert not moved(train(task, weights, 1, run="another"), first)


def test_all_travels_together_or_apart_and_the_step_is_the_same():
    together, apart = task_of(Normed), task_of(Normed, federated=nnx.PathContains("body"))
    weights = together.init(0)
    whole = train(together, weights)
    part = train(apart, {name: weights[name] for name in apart.model_form()})
    assert all(np.allclose(part[name], whole[name], rtol=1e-6) for name in part)


def test_the_trained_model_is_scored_beside_the_received_one():
    task = task_of(
        Normed,
        federated=nnx.Not(nnx.PathContains("head")),
        valid_data=numbers(1),
        metrics={"off": lambda outputs, targets: jnp.abs(outputs - targets)},
        score_trained=True,
    )
    weights = task.init(0)
    result = task.train(weights, RoundPlan(epochs=2, batch_size=4, round=1), lambda *_: None)
    found = task.evaluate(result.weights)  # with the head that was trained with them
    assert result.metrics["personal_loss"] == pytest.approx(found.loss)
    assert result.metrics["personal_off"] == pytest.approx(found.metrics["off"])


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        (
            {"federated": False},
            "the model has no tensor left to send; .*of the model: body/bias, ",
        ),
        ({"frozen": True}, "the model has no tensor left to send"),
        ({"frozen": nnx.Param}, "the model has no parameter left to train"),
    ],
)
def test_filters_that_leave_nothing_are_refused(filters, told):
    with pytest.raises(TaskError, match=told):
        task_of(Normed, **filters)


def test_statistics_that_are_frozen_are_not_updated():
    task = task_of(Normed, frozen=nnx.PathContains("norm"), valid_data=numbers(1))
    before = jax.tree.map(np.asarray, task._parts.at_home.frozen)
    trained = train(task, task.init(0))
    assert sorted(trained) == ["body/bias", "body/kernel", "head/bias", "head/kernel"]
    jax.tree.map(np.testing.assert_array_equal, before, task._parts.at_home.frozen)
    assert not task._personal.latest()


def test_a_plan_may_train_a_part_of_the_model_and_the_rest_stays_as_it_is():
    task = task_of(Normed, optimizer=optax.adam)
    weights = task.init(0)
    trained = train(task, weights, train=("head/*",))
    assert sorted(moved(trained, weights)) == ["head/bias", "head/kernel", "norm/mean", "norm/var"]
    whole = train(task, weights)
    assert "body/kernel" in moved(whole, weights)  # and the next round may train all of it


def test_personal_tensors_outlive_their_worker(tmp_path):
    filters = {"federated": nnx.PathContains("body")}
    task, alone = task_of(Normed, **filters), task_of(Normed, **filters)
    task.keep_in(tmp_path)
    weights = task.init(0)
    first = train(task, weights, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["personal-0001.safetensors"]
    train(alone, weights, 1)
    again = task_of(Normed, **filters)
    again.keep_in(tmp_path)
    assert not moved(train(again, first, 2), train(alone, first, 2))


def test_a_local_rule_may_be_given_by_its_name():
    weights = task_of(Scaled).init(0)
    named, made = (task_of(Scaled, local_rule=rule) for rule in ("clip:0.1", Clip(0.1)))
    clipped = train(named, weights)
    assert any((clipped[name] != train(task_of(Scaled), weights)[name]).any() for name in clipped)
    for name, array in train(made, weights).items():
        np.testing.assert_array_equal(clipped[name], array)


def test_a_model_is_evaluated_with_the_personal_tensors_of_its_run():
    filters = {"federated": nnx.PathContains("linear"), "valid_data": numbers(1)}
    task = task_of(Scaled, **filters)
    weights = task.init(0)
    first = task.evaluate(weights)
    train(task, weights, 5, run="earlier")
    trained = task.evaluate(weights)
    assert trained != first
    task.local_rule.of_work(("r", 1, 1))
    assert task.evaluate(weights) == first
    task.local_rule.of_work(("earlier", 6, 6))
    assert task.evaluate(weights) == trained


def test_a_personal_layer_that_the_model_gains_begins_as_initialized(tmp_path):
    class Headed(Scaled):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.more = nnx.Linear(1, 1, rngs=rngs)

        def __call__(self, inputs: Any) -> Any:
            return super().__call__(inputs) + self.more(inputs[:, :1])[:, 0]

    filters = {"federated": nnx.PathContains("linear"), "valid_data": numbers(1)}
    before, after = task_of(Scaled, **filters), task_of(Headed, **filters)
    for task in (before, after):
        task.keep_in(tmp_path)
    weights = before.init(0)
    train(before, weights, 1)
    assert np.isfinite(after.evaluate(weights).loss)
    train(after, weights, 2)
    kept = after._personal.latest()
    assert sorted(kept) == ["head/bias", "head/kernel", "more/bias", "more/kernel"]


# --- data --------------------------------------------------------------------------------------


class Masked(nnx.Module):
    """A model of two named inputs; the mask selects features."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(FEATURES, 1, rngs=rngs)

    def __call__(self, values: Any, mask: Any) -> Any:
        return self.linear(values * mask)[:, 0]


def test_several_inputs_come_by_their_names_or_in_their_order():
    inputs, targets = numbers()
    mask = (np.random.default_rng(5).random(inputs.shape) < 0.5).astype(np.float32)
    plain = task_of(Line, train_data=(inputs * mask, targets), valid_data=(inputs * mask, targets))
    weights = plain.init(0)
    expected = train(plain, weights)
    for given in ({"mask": mask, "values": inputs}, (inputs, mask)):
        task = task_of(Masked, train_data=(given, targets), valid_data=(given, targets))
        trained = train(task, weights)
        for name in expected:
            np.testing.assert_allclose(trained[name], expected[name], rtol=1e-6)
        assert task.evaluate(weights).loss == pytest.approx(plain.evaluate(weights).loss)


@pytest.mark.parametrize("count", [8, 11])
def test_a_loss_may_look_at_the_whole_batch(monkeypatch, count):
    monkeypatch.setattr(adapted, "EVALUATION_BATCH", 4)

    def spread(outputs: Any, targets: Any) -> Any:
        return jnp.var(outputs - targets)

    inputs, targets = numbers(2, count)
    task = task_of(Line, loss=spread, valid_data=(inputs, targets), metrics={"mse": squared})
    weights = task.init(0)
    wrong = (inputs @ weights["linear/kernel"])[:, 0] - targets
    parts = [wrong[start : start + 4] for start in range(0, count, 4)]
    found = task.evaluate(weights)
    expected = sum(len(part) * part.var() for part in parts) / count
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.metrics["mse"] == pytest.approx((wrong**2).mean(), rel=1e-5)
    assert task.evaluate(train(task, weights)).loss < found.loss


def test_arrays_of_different_lengths_are_refused():
    inputs, targets = numbers()
    with pytest.raises(TaskError, match="arrays of train_data have different numbers of examples"):
        task_of(Line, train_data=(inputs, targets[:-1]))


def test_a_stream_is_trained_as_the_arrays_that_it_comes_from():
    inputs, targets = numbers()
    seen: list[tuple[int, int]] = []

    def batches(epoch: int, rng: np.random.Generator) -> Iterator[Any]:
        order = rng.permutation(COUNT)
        seen.append((epoch, int(order[0])))
        for start in range(0, COUNT, 5):  # 5, 5 and 2
            chosen = order[start : start + 5]
            yield inputs[chosen], targets[chosen]

    task = task_of(Line, train_data=batches, num_examples=COUNT)
    weights, told = task.init(0), list[tuple[int, int]]()
    plan = RoundPlan(epochs=2, batch_size=5, seed=7)
    result = task.train(weights, plan, lambda *step: told.append(step[:2]))
    assert told == [(step, 6) for step in range(1, 7)]
    assert result.num_examples == COUNT
    assert [epoch for epoch, _ in seen] == [0, 1]
    kernel, bias = weights["linear/kernel"][:, 0].astype(np.float64), 0.0
    for epoch in (0, 1):
        order = np.random.default_rng([7, 0, epoch]).permutation(COUNT)
        for start in range(0, COUNT, 5):
            chosen = order[start : start + 5]
            wrong = inputs[chosen] @ kernel + bias - targets[chosen]
            kernel = kernel - 0.05 * 2 * (wrong[:, None] * inputs[chosen]).mean(axis=0)
            bias -= 0.05 * 2 * wrong.mean()
    np.testing.assert_allclose(result.weights["linear/kernel"][:, 0], kernel, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_plan_may_say_steps_instead_of_epochs(steps):
    inputs, targets = numbers()

    def batches(epoch: int, rng: np.random.Generator) -> Iterator[Any]:
        for start in range(0, COUNT, 4):
            yield inputs[start : start + 4], targets[start : start + 4]

    told: list[tuple[int, int]] = []
    for data in ({"train_data": (inputs, targets)}, {"train_data": batches, "num_examples": COUNT}):
        task = task_of(Line, **data)
        plan = Plan(epochs=9, steps=steps, batch_size=4)
        task.train(task.init(0), plan, lambda *step: told.append(step[:2]))
    assert told == 2 * [(number, steps) for number in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train_data": lambda epoch, rng: iter(())}, "give num_examples="),
        ({"train_data": lambda epoch, rng: iter(()), "num_examples": 5}, "no batch in epoch 0"),
    ],
)
def test_a_stream_of_nothing_is_refused(data, told):
    with pytest.raises(TaskError, match=told):
        train(task_of(Line, **data), task_of(Line).init(0))


def test_gradients_are_accumulated_by_an_optimizer_that_waits():
    def accumulated(learning_rate: float) -> Any:
        every = optax.MultiSteps(optax.adam(learning_rate), every_k_schedule=3)
        return every.gradient_transformation()

    small, large = task_of(Line, optimizer=accumulated), task_of(Line, optimizer=optax.adam)
    weights = small.init(0)
    found = train(small, weights, batch_size=4)
    expected = train(large, weights, batch_size=COUNT)
    assert moved(found, weights)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


# --- the learning rate, and rules of single examples -------------------------------------------


def test_another_learning_rate_is_not_compiled_again():
    task = task_of(Normed, optimizer=optax.adam)
    weights = task.init(0)
    Normed.traces = 0
    one, two = (train(task, weights, learning_rate=rate) for rate in (0.1, 0.001))
    assert Normed.traces == 1
    assert moved(one, two)


def test_an_optimizer_that_looks_at_its_learning_rate_is_compiled_for_each():
    def cautious(learning_rate: float) -> optax.GradientTransformation:
        return optax.sgd(learning_rate if learning_rate < 0.01 else 0.0)

    task = task_of(Line, optimizer=cautious)
    weights = task.init(0)
    assert not moved(train(task, weights, learning_rate=0.1), weights)
    assert moved(train(task, weights, learning_rate=0.001), weights)


def test_another_local_rule_of_the_same_form_is_another_step():
    task = task_of(Line)
    weights, lengths = task.init(0), []
    for norm in (0.5, 0.25):
        task.local_rule = BoundRule(Clip(norm))
        trained = train(task, weights, steps=1, batch_size=COUNT, learning_rate=1.0)
        lengths.append(np.sqrt(sum(((trained[n] - weights[n]) ** 2).sum() for n in weights)))
    assert lengths == pytest.approx([0.5, 0.25], rel=1e-5)


def test_the_control_variate_of_a_compiled_training_is_its_mean_gradient():
    task, rate = task_of(Line, local_rule=Scaffold()), 0.05
    weights = task.init(0)
    zeros = {name: np.zeros_like(one) for name, one in weights.items()}
    task.local_rule.of_work(("r", 1, 1), zeros)
    first = train(task, weights, 1)
    for name, one in task.local_rule.sent.items():
        np.testing.assert_allclose(one, (weights[name] - first[name]) / (6 * rate), rtol=1e-4)
    task.local_rule.of_work(("r", 2, 2), zeros)
    kept = task.local_rule.begin(weights).own
    corrected = train(task, weights, 2)
    raw = {name: kept[name] + task.local_rule.sent[name] for name in kept}
    for name in weights:  # each step used g - c_k
        used = (weights[name] - corrected[name]) / (6 * rate)
        np.testing.assert_allclose(used, raw[name] - kept[name], rtol=1e-3, atol=1e-5)


def test_a_personal_head_is_not_corrected_and_its_control_variate_stays_at_home():
    filters = {"federated": nnx.PathContains("linear"), "optimizer": optax.sgd}
    task, plain = task_of(Scaled, local_rule=Scaffold(), **filters), task_of(Scaled, **filters)
    weights = task.init(0)
    zeros = {name: np.zeros_like(one) for name, one in weights.items()}
    for number in (1, 2):
        task.local_rule.of_work(("r", number, number), zeros)
        for one in (task, plain):
            train(one, weights, number, steps=1)
        assert task.local_rule.sent.keys() == weights.keys()
    # The first step of a round is at the same weights in both, apart from what travels.
    assert not moved(task._personal.latest(), plain._personal.latest())


def test_dp_sgd_without_noise_or_clipping_is_sgd_and_tells_no_loss():
    plain, private = task_of(Line), task_of(Line, local_rule=DpSgd(1e6, 0.0))
    weights, seen = plain.init(0), list[Any]()
    result = private.train(
        weights, RoundPlan(epochs=2, batch_size=4), lambda *step: seen.append(step[2])
    )
    expected = train(plain, weights, 0)
    for name in expected:
        np.testing.assert_allclose(result.weights[name], expected[name], rtol=1e-5)
    assert result.metrics == {"steps": 6}
    assert set(seen) == {None}


def test_no_example_moves_a_private_training_by_more_than_its_share():
    inputs, targets = numbers()
    wild = targets.copy()
    wild[0] = -1e6  # its clipped gradient points the other way
    plan = {"epochs": 1, "batch_size": COUNT, "learning_rate": 1.0}
    rule = DpSgd(0.5, 0.0)
    one = train(task_of(Line, local_rule=rule), task_of(Line).init(0), **plan)
    data = {"train_data": (inputs, wild)}
    two = train(task_of(Line, local_rule=rule, **data), task_of(Line).init(0), **plan)
    distance = np.sqrt(sum(((one[name] - two[name]) ** 2).sum() for name in one))
    assert 0 < distance <= 2 * 0.5 / COUNT * 1.001


class Calls(Line):
    """A line that counts its calls in training, beside a variable that never changes."""

    def __init__(self, rngs: nnx.Rngs, kind: Any, counts: bool = True) -> None:
        super().__init__(rngs)
        self.calls, self.scale = kind(jnp.zeros(())), nnx.Variable({"all": jnp.ones(FEATURES)})
        self.counts, self.deterministic = counts, False

    def __call__(self, inputs: Any) -> Any:
        if self.counts and not self.deterministic:
            self.calls[...] = self.calls[...] + 1
        return super().__call__(inputs * self.scale["all"])


@pytest.mark.parametrize("rule", [None, DpSgd(1.0, 0.0)])
def test_a_variable_that_training_changes_must_be_kept_or_meant_to_be_reset(rule):
    class Count(nnx.Variable):
        pass

    def after(kind: Any, **options: Any) -> Weights:
        task = task_of(lambda rngs: Calls(rngs, kind, **options), local_rule=rule)
        return train(task, task.init(0))

    for kind in (nnx.Intermediate, nnx.Cache):
        assert "calls" not in after(kind)
    assert "calls" not in after(Count, counts=False)
    with pytest.raises(TaskError, match="training changes 'calls', .* neither sent nor kept"):
        after(Count)


def test_a_variable_derived_from_batch_stat_travels():
    class Count(nnx.BatchStat):
        pass

    task = task_of(lambda rngs: Calls(rngs, Count))
    assert train(task, task.init(0))["calls"] == 6


def test_dp_sgd_refuses_batch_normalization():
    task = task_of(Normed, local_rule=DpSgd(1.0, 1.0))
    with pytest.raises(TaskError, match="DpSgd .* batch normalization mixes the examples"):
        train(task, task.init(0))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any, train: bool) -> Any:
        hidden = linen.BatchNorm(use_running_average=not train)(linen.Dense(2)(inputs))
        return linen.Dense(1)(linen.Dropout(0.5, deterministic=not train)(hidden))[:, 0]


def test_a_linen_module_in_the_wrapper_of_the_task_page_trains_as_in_flax():
    page = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")
    block = next(each for each in re.findall(r"```python\n(.*?)```", page, re.S) if "ToNNX" in each)
    names = {"nnx": nnx, "np": np, "LinenNet": LinenNet}
    exec(block, names)
    inputs = np.random.default_rng(0).normal(size=(COUNT, 64)).astype(np.float32)
    task = flax_task(names["Net"], lambda out, y: (out - y) ** 2, optax.sgd, (inputs, inputs[:, 0]))
    received = task.init(0)

    def trained(seed: int) -> Weights:
        plan = Plan(batch_size=COUNT, learning_rate=0.1, seed=seed)
        return task.train(received, plan, lambda *_: None).weights

    one, other = trained(1), trained(2)
    hidden = inputs @ received["net/Dense_0/kernel"] + received["net/Dense_0/bias"]
    mean = 0.01 * hidden.mean(axis=0)  # linen's momentum is 0.99
    np.testing.assert_allclose(one["net/BatchNorm_0/mean"], mean, rtol=1e-5, atol=1e-7)
    kernel = "net/Dense_1/kernel"
    assert not np.array_equal(one[kernel], other[kernel])  # dropout
