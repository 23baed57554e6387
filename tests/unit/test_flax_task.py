"""The Flax adapter: which tensors travel, and training compared with NumPy."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights, same_form
from fluffle_worker.local.base import Plain
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.dp_sgd import DpSgd
from fluffle_worker.task import RoundPlan
from fluffle_worker.tasks import adapted, flat_step
from fluffle_worker.tasks import flax as training
from fluffle_worker.tasks.examples import accuracy
from fluffle_worker.tasks.flax import FlaxTask, flax_task

COUNT, FEATURES, CLASSES = 22, 4, 3


pytestmark = pytest.mark.usefixtures("compiled_elsewhere")


class Net(nnx.Module):
    """A tiny network with all kinds of state, which counts its tracings."""

    traces = 0

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        Net.traces += 1
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(inputs)))))


class Line(nnx.Module):
    """A linear model, simple enough to repeat in NumPy."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(FEATURES, 1, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.linear(inputs)[:, 0]


class Scaled(Plain):
    """A local rule that multiplies each gradient by a number."""

    def __init__(self, by: float) -> None:
        self.by = by

    def gradient(self, gradient: Any, weights: Any, state: Any) -> Any:
        return {name: self.by * one for name, one in gradient.items()}, state


def cross_entropy(outputs: Any, targets: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def squared(outputs: Any, targets: Any) -> Any:
    return (outputs - targets) ** 2


def examples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, FEATURES)).astype(np.float32)
    return inputs, np.abs(inputs[:, 0] * 2).astype(np.int32).clip(0, CLASSES - 1)


def numbers(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    inputs, _ = examples(count, seed)
    return inputs, (inputs @ np.array([1, -2, 3, 0.5], np.float32) + 1).astype(np.float32)


def net(**changes: Any) -> FlaxTask:
    told: dict[str, Any] = {
        "model": Net,
        "loss": cross_entropy,
        "optimizer": optax.sgd,
        "train_data": examples(COUNT),
        "valid_data": examples(10, seed=1),
        "learning_rate": 0.1,
        "metrics": {"accuracy": accuracy},
    }
    return flax_task(**(told | changes))


def line(**changes: Any) -> FlaxTask:
    told: dict[str, Any] = {
        "model": Line,
        "loss": squared,
        "optimizer": optax.sgd,
        "train_data": numbers(COUNT),
        "learning_rate": 0.01,
    }
    return flax_task(**(told | changes))


@pytest.fixture(scope="module")
def shared() -> FlaxTask:
    """Return one task for all tests that do not change it, because compiling is slow."""
    return net()


def ignore(*_: object) -> None:
    pass


def same(one: Weights, two: Weights) -> bool:
    same_form(one, two)
    return all(one[name].tobytes() == two[name].tobytes() for name in one)


PLAN = Plan(epochs=2, batch_size=8, seed=5)  # 22 examples: batches of 8, 8 and 6


# --- what is averaged --------------------------------------------------------------------------


def test_parameters_and_running_statistics_travel_and_nothing_else(shared):
    weights = shared.init(0)
    assert {name: (array.shape, array.dtype.name) for name, array in weights.items()} == {
        "hidden/kernel": ((4, 8), "float32"),
        "hidden/bias": ((8,), "float32"),
        "norm/scale": ((8,), "float32"),
        "norm/bias": ((8,), "float32"),
        "norm/mean": ((8,), "float32"),
        "norm/var": ((8,), "float32"),
        "out/kernel": ((8, 3), "float32"),
        "out/bias": ((3,), "float32"),
    }
    assert all(isinstance(array, np.ndarray) for array in weights.values())
    same_form(shared.train(weights, PLAN, ignore).weights, weights)


def test_training_moves_every_tensor_the_statistics_too(shared):
    weights = shared.init(0)
    trained = shared.train(weights, PLAN, ignore).weights
    still = [name for name in weights if np.array_equal(weights[name], trained[name])]
    assert still == []


def test_first_weights_are_the_same_for_the_same_seed_whoever_is_asked(shared):
    other = net(train_data=examples(9, seed=3), sample_seed=9)
    assert same(shared.init(4), other.init(4))
    assert not same(shared.init(4), shared.init(5))


@pytest.mark.parametrize("seed", [0, 3])
def test_first_weights_are_those_that_the_model_is_made_with(shared, seed):
    made = Net(nnx.Rngs(seed))
    found = shared.init(seed)
    np.testing.assert_allclose(found["hidden/kernel"], made.hidden.kernel.get_value(), rtol=1e-6)
    np.testing.assert_allclose(found["out/kernel"], made.out.kernel.get_value(), rtol=1e-6)


def test_a_model_may_look_at_its_values_while_it_is_made():
    class Looking(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
            self.spread = float(np.asarray(self.dense.kernel.get_value()).std())

        def __call__(self, inputs: jax.Array) -> jax.Array:
            return self.dense(inputs) / self.spread

    made = net(model=Looking)
    weights = made.init(5)
    trained = made.train(weights, PLAN, ignore).weights
    same_form(trained, weights)
    assert not same(trained, weights)


def test_what_was_received_is_left_as_it_was(shared):
    weights = shared.init(0)
    kept = {name: array.copy() for name, array in weights.items()}
    read_only = {
        name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
        for name, array in weights.items()
    }
    shared.train(read_only, PLAN, ignore)
    shared.evaluate(read_only)
    assert same(read_only, kept)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: {**w, "more": w["out/bias"]},
        lambda w: {name: array for name, array in w.items() if name != "norm/mean"},
        lambda w: {**w, "out/bias": w["out/bias"].astype(np.float64)},
        lambda w: {**w, "out/bias": w["out/bias"][None]},
        lambda w: {**w, "out/bias": np.zeros(1, np.float32)},
        lambda w: {},
    ],
)
def test_weights_of_another_form_are_refused(shared, spoil):
    weights = spoil(shared.init(0))
    asked: list[Callable[[], object]] = [
        lambda: shared.train(weights, PLAN, ignore),
        lambda: shared.evaluate(weights),
        lambda: shared.check(weights),
        lambda: shared.outputs(weights, examples(2)[0]),
    ]
    for one in asked:
        with pytest.raises(ValueError, match="tensor"):
            one()


# --- training ----------------------------------------------------------------------------------


def test_training_is_the_same_for_the_same_seed(shared):
    weights = shared.init(0)
    first = shared.train(weights, PLAN, ignore)
    again = shared.train(weights, PLAN, ignore)
    elsewhere = net().train(weights, PLAN, ignore)  # another process would make its own task
    assert same(first.weights, again.weights)
    assert same(first.weights, elsewhere.weights)
    assert first.metrics == again.metrics == elsewhere.metrics
    other = shared.train(weights, PLAN.model_copy(update={"seed": 6}), ignore)
    assert not same(first.weights, other.weights)


def test_workers_see_their_examples_in_orders_of_their_own():
    weights = line().init(0)
    one, two = (line(sample_seed=seed).train(weights, PLAN, ignore).weights for seed in (1, 2))
    assert not same(one, two)


def test_a_part_of_a_part_has_examples_of_that_part_only():
    whole, targets = line(), numbers(COUNT)[1]
    part = whole.part(np.array([1, 5, 7, 9]), 2)
    np.testing.assert_array_equal(part.labels, targets[[1, 5, 7, 9]])
    inner = part.part(np.array([0, 3]), 3)
    np.testing.assert_array_equal(inner.labels, targets[[1, 9]])
    expected, weights = whole.part(np.array([1, 9]), 3), whole.init(0)
    one, other = (task.train(weights, PLAN, ignore).weights for task in (inner, expected))
    assert same(one, other)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32, 2**63 - 1])
def test_every_seed_that_a_plan_may_have_can_be_trained_with(seed):
    task = line(sample_seed=2**32 - 1)
    result = task.train(task.init(0), Plan(seed=seed), ignore)
    assert all(np.isfinite(array).all() for array in result.weights.values())


def test_the_result_says_how_many_examples_and_the_mean_loss(shared):
    seen: list[float | None] = []
    result = shared.train(shared.init(0), PLAN, lambda *told: seen.append(told[2]))
    assert result.num_examples == COUNT
    # All losses but the last were reported, each one step later.
    assert seen[0] is None
    assert len(seen) == 6
    last = 6 * result.metrics["loss"] - sum(seen[1:])
    assert 0 < last < 10


def test_a_step_is_what_numpy_makes_of_it():
    """Compare with full-batch gradient descent in NumPy."""
    inputs, targets = numbers(COUNT)
    task = line()
    weights = task.init(1)
    plan = Plan(epochs=3, batch_size=COUNT, learning_rate=0.05)
    result = task.train(weights, plan, ignore)
    kernel = weights["linear/kernel"][:, 0].astype(np.float64)
    bias = float(weights["linear/bias"][0])
    losses = []
    for _ in range(3):
        wrong = inputs @ kernel + bias - targets
        losses.append((wrong**2).mean())
        kernel = kernel - 0.05 * 2 * (wrong[:, None] * inputs).mean(axis=0)
        bias -= 0.05 * 2 * wrong.mean()
    np.testing.assert_allclose(result.weights["linear/kernel"][:, 0], kernel, rtol=1e-5)
    np.testing.assert_allclose(result.weights["linear/bias"], [bias], rtol=1e-5)
    assert result.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_learns(shared):
    task = line(valid_data=numbers(50, seed=9))
    weights = task.init(0)
    trained = task.train(weights, Plan(epochs=40, batch_size=8, learning_rate=0.05), ignore).weights
    assert task.evaluate(trained).loss < 0.01 * task.evaluate(weights).loss


@pytest.mark.parametrize("batch_size", [1, 5, 8, 22, 1000])
@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epoch_shows_every_example_and_batches_have_one_size(batch_size, epochs):
    task = line()
    batches = list(task._data.batches(Plan(epochs=epochs, batch_size=batch_size)))
    size = min(batch_size, COUNT)
    assert {len(batch) for batch in batches} == {size}
    each = -(-COUNT // size)
    assert len(batches) == epochs * each
    orders = []
    for epoch in range(epochs):
        order = np.concatenate(batches[epoch * each : (epoch + 1) * each])
        assert set(order[:COUNT]) == set(range(COUNT))  # each once, before any comes again
        orders.append(order.tolist())
    assert len({tuple(order) for order in orders}) == epochs


def test_the_plans_learning_rate_is_used_and_else_the_tasks_own():
    task = line(learning_rate=0.02)
    weights = task.init(0)

    def moved(learning_rate: float | None) -> np.ndarray:
        plan = Plan(batch_size=COUNT, learning_rate=learning_rate)
        return task.train(weights, plan, ignore).weights["linear/kernel"] - weights["linear/kernel"]

    np.testing.assert_allclose(moved(0.04), 2 * moved(0.02), rtol=1e-3)
    assert np.array_equal(moved(None), moved(0.02))
    assert not np.array_equal(moved(0.04), moved(0.02))


def test_an_optimizer_that_is_complete_takes_no_learning_rate():
    weights = line().init(0)
    fixed = line(optimizer=optax.sgd(0.02))
    slow, fast = (
        fixed.train(weights, Plan(learning_rate=rate), ignore).weights for rate in (0.001, 0.5)
    )
    assert same(slow, fast)
    assert same(slow, line().train(weights, Plan(learning_rate=0.02), ignore).weights)


def test_a_step_is_that_of_its_rule_although_an_earlier_one_was_freed():
    """A new object often has the address of a freed one, and so its ``id``."""
    task, first = line(), Scaled(1.0)
    weights, address = task.init(0), id(first)
    task.local_rule = BoundRule(first)
    assert not same(task.train(weights, PLAN, ignore).weights, weights)
    task.local_rule = BoundRule()
    del first
    gc.collect()
    rules = [Scaled(0.0) for _ in range(100_000)]
    task.local_rule = BoundRule(next((r for r in rules if id(r) == address), rules[0]))
    assert same(task.train(weights, PLAN, ignore).weights, weights)


def test_an_optimizer_that_needs_the_loss_is_told_it():
    """Compare a step of Polyak's rule with NumPy."""
    inputs, targets = numbers(COUNT)
    task = line(optimizer=lambda rate: optax.polyak_sgd(max_learning_rate=rate))
    weights = task.init(1)
    trained = task.train(weights, Plan(batch_size=COUNT, learning_rate=10.0), ignore).weights
    kernel = weights["linear/kernel"][:, 0].astype(np.float64)
    wrong = inputs @ kernel + float(weights["linear/bias"][0]) - targets
    gradient = 2 * (wrong[:, None] * inputs).mean(axis=0)
    rate = (wrong**2).mean() / ((gradient**2).sum() + (2 * wrong.mean()) ** 2)
    np.testing.assert_allclose(trained["linear/kernel"][:, 0], kernel - rate * gradient, rtol=1e-4)


def test_a_line_search_evaluates_the_loss_of_the_batch():
    task = line(optimizer=optax.lbfgs())
    plan = Plan(epochs=20, batch_size=COUNT)
    trained = task.train(task.init(1), plan, ignore).weights
    np.testing.assert_allclose(trained["linear/kernel"][:, 0], [1, -2, 3, 0.5], atol=1e-4)


def test_an_optimizer_that_takes_nothing_but_gradients_is_given_nothing_else():
    task = line(optimizer=lambda rate: optax.contrib.sam(optax.sgd(rate), optax.sgd(0.0)))
    weights = task.init(0)
    plan = PLAN.model_copy(update={"steps": 2})  # sam takes a step only at every second gradient
    moved = task.train(weights, plan, ignore).weights
    assert any((moved[name] != weights[name]).any() for name in weights)


def test_an_optimizer_is_not_told_the_loss_that_a_private_rule_hides():
    task = line(optimizer=optax.polyak_sgd(), local_rule=DpSgd(1.0, 1.0))
    with pytest.raises(TypeError, match="value"):
        task.train(task.init(1), PLAN, ignore)


def test_the_optimizer_starts_afresh_in_every_round():
    task = line(optimizer=optax.adam)
    weights = task.init(0)
    first = task.train(weights, PLAN, ignore).weights
    task.train(first, PLAN, ignore)
    assert same(task.train(weights, PLAN, ignore).weights, first)


def test_dropout_is_new_at_every_step_and_off_in_evaluation():
    # Nothing is learnt, and every step sees all examples: only dropout makes the losses differ.
    task = net(optimizer=optax.sgd(0.0))
    losses: list[float] = []
    plan = Plan(epochs=4, batch_size=COUNT)
    weights = task.init(0)
    task.train(weights, plan, lambda _, __, loss: losses.append(loss))
    assert len(set(losses[1:])) == 3
    assert task.evaluate(weights) == task.evaluate(weights)
    np.testing.assert_array_equal(
        task.outputs(weights, examples(5)[0]), task.outputs(weights, examples(5)[0])
    )


class Dropped(Line):
    """A linear model of inputs of which a half is dropped."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return super().__call__(self.dropout(inputs))


def noise(key: Any, inputs: Any) -> Any:
    return inputs + jax.random.normal(key, inputs.shape)


@pytest.mark.parametrize("changes", [{"model": Dropped}, {"augment": noise}])
def test_random_draws_differ_between_rounds_and_workers_but_not_in_a_repetition(changes):
    # All examples are alike, so that their order makes no difference.
    alike = np.ones((16, FEATURES), np.float32), np.ones(16, np.float32)
    weights = line().init(0)

    @functools.cache
    def task(sample_seed: int) -> FlaxTask:
        return line(train_data=alike, sample_seed=sample_seed, **changes)

    def trained(seed: int, sample_seed: int) -> Any:
        plan = Plan(seed=seed, steps=1, batch_size=16)
        return task(sample_seed).train(weights, plan, ignore).weights

    first = trained(1, 0)
    task.cache_clear()  # as after a restart
    assert same(trained(1, 0), first)
    # (0, 1): another worker in an earlier round, whose seeds have the same sum
    for seed, sample_seed in ((2, 0), (1, 8), (1, 2**32), (1 + 2**40, 0), (0, 1)):
        assert not same(trained(seed, sample_seed), first)


def test_initial_weights_depend_on_all_bits_of_the_seed():
    task = line()
    assert not same(task.init(5), task.init(2**32 + 5))


def test_augmentation_changes_training_only_and_differs_from_step_to_step():
    def augment(key: Any, inputs: Any) -> Any:
        return inputs + jax.random.normal(key, inputs.shape)

    valid = numbers(10, seed=1)
    plain = line(optimizer=optax.sgd(0.0), valid_data=valid)
    noisy = line(optimizer=optax.sgd(0.0), valid_data=valid, augment=augment)
    weights = plain.init(0)
    losses: list[float] = []
    plan = Plan(epochs=4, batch_size=COUNT)
    noisy.train(weights, plan, lambda _, __, loss: losses.append(loss))
    assert len(set(losses[1:])) == 3
    assert noisy.evaluate(weights) == plain.evaluate(weights)
    assert noisy.train(weights, plan, ignore).metrics == noisy.train(weights, plan, ignore).metrics


# --- how it is done ----------------------------------------------------------------------------


def test_many_small_steps_in_one_call_are_bit_by_bit_the_same_steps(monkeypatch):
    plan = RoundPlan(steps=40, batch_size=7, seed=3)
    weights = net().init(0)
    seen: dict[str, list[Any]] = {"many": [], "one": []}
    many = net().train(weights, plan, lambda *step: seen["many"].append(step))
    monkeypatch.setattr(flat_step, "_SMALL_FLOPS", 0)
    one = net().train(weights, plan, lambda *step: seen["one"].append(step))
    assert seen["many"] == seen["one"]
    assert [step[:2] for step in seen["one"]] == [(number, 40) for number in range(1, 41)]
    assert many.metrics == one.metrics
    for name in weights:
        np.testing.assert_array_equal(many.weights[name], one.weights[name])


@pytest.mark.parametrize(("small_flops", "form"), [(1e9, "jit(_loop)"), (0, "jit(_on_leaves)")])
def test_a_step_is_lowered_once_in_the_form_that_trains(monkeypatch, small_flops, form):
    monkeypatch.setattr(flat_step, "_SMALL_FLOPS", small_flops)
    task, lowered = net(), []
    weights = task.init(0)

    def listen(event: str, _: float, **more: Any) -> None:
        if event.endswith("jaxpr_to_mlir_module_duration"):
            lowered.append(more["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(2):
            task.train(weights, PLAN, ignore)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert lowered.count(form) == 1
    if form == "jit(_loop)":
        assert "jit(_on_leaves)" not in lowered


@pytest.mark.parametrize("layer", ["dense", "convolution"])
def test_convolutions_are_not_put_into_a_loop_where_xla_is_slow(layer, monkeypatch):
    class Small(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.convolution = nnx.Conv(1, 2, (3,), rngs=rngs)
            self.dense = nnx.Linear(FEATURES * (2 if layer == "convolution" else 1), 1, rngs=rngs)

        def __call__(self, inputs: Any) -> Any:
            if layer == "convolution":
                inputs = self.convolution(inputs[..., None]).reshape(len(inputs), -1)
            return self.dense(inputs)[:, 0]

    task = flax_task(Small, squared, optax.sgd(0.1), numbers(30))
    calls: list[int] = []
    run = flat_step.FlatStep.run

    def counted(self: Any, *given: Any) -> Any:
        for found in run(self, *given):
            calls.append(len(found[1]))
            yield found

    monkeypatch.setattr(flat_step.FlatStep, "run", counted)
    task.train(task.init(0), RoundPlan(steps=20, batch_size=10), ignore)
    assert calls == ([16, 4] if layer == "dense" else [1] * 20)


def test_a_step_is_compiled_once_although_the_last_batch_is_short():
    task = net(valid_data=None)
    weights = task.init(0)
    Net.traces = 0
    trained = task.train(weights, PLAN, ignore).weights
    assert Net.traces == 1
    task.train(trained, PLAN.model_copy(update={"seed": 9}), ignore)
    read = {
        name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
        for name, array in trained.items()
    }
    task.train(read, PLAN, ignore)
    assert Net.traces == 1


@pytest.mark.parametrize(
    "optimizer", [optax.sgd, lambda rate: optax.polyak_sgd(max_learning_rate=rate)]
)
def test_a_step_is_compiled_once_for_all_learning_rates(optimizer):
    task = net(optimizer=optimizer, valid_data=None)
    weights = task.init(0)
    Net.traces = 0
    for rate in (0.01, 0.02):
        task.train(weights, PLAN.model_copy(update={"learning_rate": rate}), ignore)
    assert Net.traces == 1


def test_an_evaluation_is_compiled_once_per_size_of_a_batch(monkeypatch):
    monkeypatch.setattr(adapted, "EVALUATION_BATCH", 4)
    task = net()
    weights = task.init(0)
    Net.traces = 0
    task.evaluate(weights)
    task.evaluate(weights)
    assert Net.traces == 2


def test_a_training_leaves_no_arrays_to_the_garbage_collector(shared):
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        for _ in range(9):
            shared.train(shared.init(0), PLAN, ignore)
        models = (len(jax.live_arrays()) - before) / len(shared.model_form())
        assert models < 4  # JAX frees the last ones a little later
    finally:
        gc.enable()


@pytest.mark.parametrize("small_flops", [0, 50e6], ids=["one step a call", "many steps a call"])
def test_a_step_writes_its_state_over_the_previous_one(monkeypatch, small_flops):
    monkeypatch.setattr(flat_step, "_SMALL_FLOPS", small_flops)
    task, seen = net(), []
    run = flat_step.FlatStep.run

    def watched(self: Any, *given: Any) -> Any:
        for state, losses in run(self, *given):
            assert all(leaf.is_deleted() for leaf in seen)
            seen[:] = state.leaves
            yield state, losses

    monkeypatch.setattr(flat_step.FlatStep, "run", watched)
    task.train(task.init(0), RoundPlan(steps=40, batch_size=8), ignore)
    assert seen
    assert not any(leaf.is_deleted() for leaf in seen)


def test_an_evaluation_moves_the_weights_to_the_device_only_once(monkeypatch):
    monkeypatch.setattr(adapted, "EVALUATION_BATCH", 4)
    task, given = net(), []
    forward = task._forward
    monkeypatch.setattr(
        task, "_forward", lambda *states: given.append(states[0]) or forward(*states)
    )
    task.evaluate(task.init(0))
    first, *later = map(jax.tree.leaves, given)
    assert len(later) == 2
    assert all(isinstance(leaf, jax.Array) for leaf in first)
    assert all(one is two for leaves in later for one, two in zip(leaves, first, strict=True))


def test_progress_hears_of_every_step(shared):
    told: list[tuple[int, int]] = []
    shared.train(shared.init(0), PLAN, lambda step, steps, _: told.append((step, steps)))
    assert told == [(step, 6) for step in range(1, 7)]


def test_what_progress_raises_stops_training_at_once(shared):
    class NotWantedError(Exception):
        pass

    told: list[int] = []

    def progress(step: int, _steps: int, _loss: float | None) -> None:
        told.append(step)
        if step == 3:
            raise NotWantedError

    weights = shared.init(0)
    before = shared.train(weights, PLAN, ignore).weights
    with pytest.raises(NotWantedError):
        shared.train(weights, PLAN, progress)
    assert told == [1, 2, 3]
    # And leaves nothing behind in the task.
    assert same(shared.train(weights, PLAN, ignore).weights, before)


def test_what_is_compiled_is_kept_where_the_environment_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        training.keep_compiled()
        assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "fluffle" / "jax"
        jax.config.update("jax_compilation_cache_dir", "/chosen/by/the/user")
        training.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == "/chosen/by/the/user"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# --- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_an_evaluation_is_numpys_mean_over_the_examples(monkeypatch, count):
    monkeypatch.setattr(adapted, "EVALUATION_BATCH", 4)
    inputs, targets = numbers(count, seed=2)
    task = line(valid_data=(inputs, targets), metrics={"off": lambda a, b: jnp.abs(a - b)})
    weights = task.init(3)
    predicted = inputs.astype(np.float64) @ weights["linear/kernel"][:, 0] + weights["linear/bias"]
    result = task.evaluate(weights)
    assert result.num_examples == count
    assert result.loss == pytest.approx(((predicted - targets) ** 2).mean(), rel=1e-5)
    assert dict(result.metrics) == {
        "off": pytest.approx(np.abs(predicted - targets).mean(), rel=1e-5)
    }


@pytest.mark.parametrize("count", [3, 4, 5, 11])
def test_a_metric_that_is_one_number_is_of_all_held_out_examples(monkeypatch, count):
    monkeypatch.setattr(adapted, "EVALUATION_BATCH", 4)
    inputs, targets = numbers(count, seed=2)
    metrics = {"top": lambda a, b: jnp.max(a), "off": lambda a, b: jnp.abs(a - b)}
    task = line(valid_data=(inputs, targets), metrics=metrics)
    weights = task.init(3)
    predicted = inputs @ weights["linear/kernel"][:, 0] + weights["linear/bias"]
    found = task.evaluate(weights).metrics
    assert found["top"] == pytest.approx(predicted.max(), rel=1e-5)
    assert found["off"] == pytest.approx(np.abs(predicted - targets).mean(), rel=1e-5)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_metric_of_outputs_without_a_row_for_each_example_is_a_mean_over_batches(
    monkeypatch, shape
):
    monkeypatch.setattr(adapted, "EVALUATION_BATCH", 4)

    class WithPenalty(Line):
        def __call__(self, inputs):
            return super().__call__(inputs), jnp.full(shape, 3.0)

    task = line(
        model=WithPenalty,
        loss=lambda outputs, targets: squared(outputs[0], targets),
        valid_data=numbers(6),
        metrics={"penalty": lambda outputs, _: outputs[1].sum()},
    )
    assert dict(task.evaluate(task.init(0)).metrics) == {"penalty": 3.0 * (2 if shape else 1)}


def test_an_evaluation_uses_the_running_statistics_it_was_given(shared):
    inputs, targets = examples(10, seed=1)
    weights = shared.train(shared.init(0), PLAN, ignore).weights
    result = shared.evaluate(weights)
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    hidden = inputs @ w["hidden/kernel"] + w["hidden/bias"]
    normed = (hidden - w["norm/mean"]) / np.sqrt(w["norm/var"] + 1e-5)
    outputs = np.maximum(normed * w["norm/scale"] + w["norm/bias"], 0) @ w["out/kernel"]
    outputs += w["out/bias"]
    np.testing.assert_allclose(shared.outputs(weights, inputs), outputs, rtol=1e-3, atol=1e-4)
    logs = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
    assert result.loss == pytest.approx(-logs[np.arange(10), targets].mean(), rel=1e-3)
    assert result.metrics["accuracy"] == pytest.approx((outputs.argmax(axis=1) == targets).mean())


@pytest.mark.parametrize("valid", [None, examples(0)])
def test_without_held_out_data_there_is_no_evaluation(valid):
    task = net(valid_data=valid)
    assert task.evaluate(task.init(0)) is None
