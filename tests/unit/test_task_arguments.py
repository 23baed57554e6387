"""What users pass to the adapters by mistake: one error names it before any training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from sklearn.metrics import roc_auc_score

import fluffle
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_worker.results import Results
from fluffle_worker.tasks.examples import accuracy
from fluffle_worker.tasks.flax import FlaxTask, flax_task

pytestmark = pytest.mark.usefixtures("compiled_elsewhere")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(20, 4)).astype(np.float32), np.tile(np.arange(2, dtype=np.int32), 10)
PLAN = Plan(seed=1, batch_size=5)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.out(inputs)


class Counting(Net):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.calls = nnx.Param(jnp.zeros(2, jnp.int32))


class Bare(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        pass


def made(**changes: Any) -> FlaxTask:
    given = {
        "model": Net,
        "loss": optax.softmax_cross_entropy_with_integer_labels,
        "optimizer": optax.sgd,
        "train_data": (X, Y),
        "valid_data": (X, Y),
    }
    return flax_task(**(given | changes))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, "of type ndarray; expected a pair"),
        ((X, Y, Y), "is a tuple with 3 entries; expected a pair"),
        ({"x": X, "y": Y}, "of type dict; expected a pair"),
        (None, "of type NoneType; expected a pair"),
        (iter([(X, Y)]), "of type list_iterator; expected a pair"),
        (
            (X.tolist(), Y.tolist()),
            "an array with one entry.*to convert a list, use numpy.asarray",
        ),
        ((list(X), list(Y)), "contains np.int32.*; expected an array"),
        ((1.0, 2), "contains 1.0; expected an array with one entry per example"),
        ((X, np.array(["a", "b"] * 10)), "dtype <U1; convert this array to numbers"),
        ((X.astype(object), Y), "dtype object; convert this array to numbers"),
        ((np.ma.masked_less(X, 0), Y), "a masked array; fill it"),
        ((X, Y[:5]), "have different numbers of examples .5, 20"),
    ],
)
def test_data_that_are_no_pair_of_arrays_are_named(data: Any, message: str):
    with pytest.raises(TaskError, match=f"^(the arrays of )?train_data .*{message}"):
        made(train_data=data)
    if data is not None:
        with pytest.raises(TaskError, match=f"^(the arrays of )?valid_data .*{message}"):
            made(valid_data=data)


def test_a_target_that_is_no_class_is_named():
    for name in ("train_data", "valid_data"):
        message = f"{name} contains the target 7, .* 3 names, for .* 0 to 2"
        with pytest.raises(TaskError, match=message):
            made(**{name: (X, Y + 6)}, classes=("a", "b", "c"))
        with pytest.raises(
            TaskError, match=f"{name} contains the target -1, .* 2 names, for .* 0 to 1"
        ):
            made(**{name: (X, Y - 1)}, classes=("a", "b"))
    assert made(train_data=(X, jnp.asarray(Y)), classes=("a", "b")).num_examples == 20


def test_held_out_data_are_no_stream():
    with pytest.raises(TaskError, match="valid_data is of type function; expected a pair"):
        made(valid_data=lambda epoch, rng: [(X, Y)])


def test_data_may_have_the_other_byte_order():
    other = X.astype(">f4"), Y.astype(">i4")
    for train_data in (other, lambda epoch, rng: iter([other])):
        task = made(train_data=train_data, valid_data=(X.astype(">f8"), Y), num_examples=20)
        trained = task.train(task.init(0), Plan(epochs=1), lambda *_: None)
        assert np.isfinite(task.evaluate(trained.weights).loss)


def test_whatever_numpy_converts_is_data():
    class Frame:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return X

    class Series:
        dtype = "category"  # of pandas, not of NumPy

        def to_numpy(self) -> Any:
            return Y

    assert made(train_data=(Frame(), jnp.asarray(Y))).num_examples == 20
    assert made(train_data=(Frame(), Series())).num_examples == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "optimizer= is 'adam'; expected an optax optimizer, such as op"),
        ({"loss": "mse"}, "loss= is 'mse'; expected a function of the outputs and targets"),
        ({"optimizer": None}, "optimizer= is None"),
        (
            {"learning_rate": None},
            "learning_rate= is None; expected a number",
        ),
        (
            {"learning_rate": "0.1"},
            "learning_rate= is '0.1'; expected a number",
        ),
        (
            {"learning_rate": math.nan},
            "learning_rate= is nan; expected a finite number",
        ),
        ({"learning_rate": -1}, "learning_rate= is -1.0; expected a number above 0"),
        ({"sample_seed": -1}, "sample_seed= is -1; expected a whole number from 0"),
        ({"sample_seed": 2**70}, "sample_seed= is 1180591620717411303424; expected a whole"),
        ({"sample_seed": "a"}, "sample_seed= is 'a'; expected a whole number"),
        (
            {"learning_rate": optax.constant_schedule(0.1)},
            "learning_rate= is <function",
        ),
        (
            {"metrics": [accuracy]},
            "metrics= is .*; expected a mapping of names to functions",
        ),
        (
            {"metrics": {"a": "accuracy"}},
            "metrics= is .*; expected a mapping of names to functions",
        ),
        ({"metrics": {"loss": accuracy}}, "metrics= contains the name 'loss'"),
        (
            {"model": Net(nnx.Rngs(0))},
            "model= is of type Net; expected a function that makes a module",
        ),
        ({"model": lambda rngs: None}, "returned an object of type NoneType; expected an nnx.Mod"),
        (
            {"model": lambda rngs: linen.Dense(1)},
            "returned an object of type Dense; .*wrap .*ToNNX",
        ),
        ({"model": linen.Dense(1)}, "model= is a flax.linen module; expected an nnx.Module"),
        ({"model": linen.Dense}, "model= is a flax.linen module; expected an nnx.Module"),
        ({"model": Bare}, "no tensor left to send; .*tensors of the model: none"),
        ({"model": Counting}, "parameter 'calls' is int32, which cannot be trained"),
        (
            {"frozen": nnx.PathContains("body")},
            "frozen= selects no tensor; .* of the model: out/bias, out",
        ),
    ],
)
def test_another_argument_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(TaskError, match=message):
        made(**changes)


def ignore(*_: Any) -> None:
    pass


def trained(stream: Any, **plan: Any) -> Any:
    task = made(train_data=stream, num_examples=20)
    return task.train(task.init(0), PLAN.model_copy(update=plan), ignore)


def endless(epoch: int, rng: Any) -> Iterator[Any]:
    while True:
        yield X[:5], Y[:5]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(X[:5], Y[:5], Y[:5])], "a batch of train_data is a tuple with 3 entries"),
        ([X[:5]], "a batch of train_data is of type ndarray"),
        (
            [(X[:5], Y[:4])],
            "the arrays of a batch of train_data have different numbers of examples",
        ),
        (
            [(X[:5].tolist(), Y[:5])],
            "a batch of train_data contains .*; expected an array with one entry per example",
        ),
        ([(X[:0], Y[:0])], "train_data yielded no batch in epoch 0"),
    ],
)
def test_a_batch_of_a_stream_is_checked(batches: Any, message: str):
    with pytest.raises(TaskError, match=message):
        trained(lambda epoch, rng: batches)


def test_an_endless_epoch_is_an_error_but_not_if_the_plan_counts_steps():
    with pytest.raises(TaskError, match="205 examples in epoch 0, but num_examples is 20"):
        trained(endless)
    assert trained(endless, steps=60).metrics["steps"] == 60


def test_a_batch_without_examples_is_skipped():
    def stream(epoch: int, rng: Any) -> Iterator[Any]:
        for start in (0, 5, 20):
            yield X[start : start + 5], Y[start : start + 5]

    metrics = trained(stream).metrics
    assert metrics["steps"] == 2
    assert math.isfinite(metrics["loss"])


def fails(outputs: Any, targets: Any) -> Any:
    raise ZeroDivisionError("no positives")


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (fails, r"ZeroDivisionError: no positives \(test_task_arguments.py:\d+\)"),
        (lambda outputs, targets: "high", "ValueError: .*"),
    ],
)
def test_a_metric_that_fails_costs_no_other(metric: Any, why: str):
    task = made(metrics={"auc": metric, "accuracy": accuracy}, score_trained=True)
    weights, notes, traces = task.init(0), [], []
    results = Results(notes.append, traces.append)
    for _ in range(2):
        result = results.evaluated(lambda: task.evaluate(weights))
        assert result is not None
        assert result.num_examples == 20
        assert result.metrics.keys() == {"accuracy"}
        update = results.trained(task.train(weights, PLAN, ignore))
        assert update.metrics.keys() == {"loss", "steps", "personal_loss", "personal_accuracy"}
    evaluation, training = notes  # each once
    assert re.fullmatch(
        rf"the metric 'auc' of evaluate\(\) failed, so it is omitted: {why}", evaluation
    )
    assert training.startswith("the metric 'personal_auc' of train() failed, so it is omitted: ")
    assert len(traces) <= 1


@pytest.mark.parametrize("targets", [{"kind": Y, "size": X[:, :2]}, (Y, Y), np.eye(3)[Y]])
def test_a_task_with_several_targets_is_divided(targets: Any):
    def loss(outputs: Any, targets: Any) -> Any:
        (first, *_) = jax.tree.leaves(targets)
        return (outputs[:, 0] - first.reshape(len(outputs), -1)[:, 0]) ** 2

    whole = made(train_data=(X, targets), valid_data=None, loss=loss)
    run = fluffle.simulate(whole, clients=4, partition="shards:2", rounds=1, progress=False)
    assert sum(run.history[-1].participants.values()) == 20
    assert math.isfinite(run.history[-1].train_loss)


def test_a_stream_is_not_divided():
    whole = made(train_data=endless, num_examples=20)
    with pytest.raises(
        TaskError, match="train_data is a function, so its batches cannot be divided"
    ):
        fluffle.simulate(whole, clients=4, progress=False)


def test_a_metric_may_use_numpy():
    task = made(metrics={"auc": lambda outputs, targets: roc_auc_score(targets, outputs[:, 1])})
    weights = task.init(0)
    expected = roc_auc_score(Y, task.outputs(weights, X)[:, 1])
    assert task.evaluate(weights).metrics == {"auc": pytest.approx(expected)}


def test_a_metric_that_fails_costs_no_other_of_a_simulation(capsys: pytest.CaptureFixture[str]):
    whole = made(metrics={"auc": fails, "accuracy": accuracy})
    run = fluffle.simulate(whole, clients=4, rounds=2, progress=False)
    assert run.history.columns == ("train_loss", "test/loss", "test/accuracy")
    assert capsys.readouterr().err.count("the metric 'auc' of evaluate() failed") == 1
