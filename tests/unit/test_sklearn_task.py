"""The scikit-learn adapter, compared with the estimator's own training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import coo_matrix, csr_matrix
from sklearn.linear_model import LinearRegression, Perceptron, SGDClassifier, SGDRegressor
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import GaussianNB

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights, same_form
from fluffle_worker.results import Results
from fluffle_worker.task import RoundPlan
from fluffle_worker.tasks.examples import index_batches
from fluffle_worker.tasks.sklearn import sklearn_task

COUNT, FEATURES = 60, 4
INPUTS = np.random.default_rng(0).normal(size=(COUNT, FEATURES))
CLASSES = INPUTS[:, :3].argmax(axis=1)
NUMBERS = INPUTS @ np.array([1.0, -2.0, 0.5, 0.0]) + 3
PLAN = Plan(epochs=3, batch_size=8, seed=5)


def ignore(*_: object) -> None:
    pass


def classifier(**options: Any) -> SGDClassifier:
    return SGDClassifier(loss="log_loss", alpha=1e-4, **options)


def trained_on(inputs: Any) -> Weights:
    """Return the weights after a training on these inputs."""
    task = sklearn_task(classifier(), (inputs, CLASSES))
    return task.train(task.init(0), PLAN, ignore).weights


def test_a_training_is_what_the_estimator_makes_of_the_same_batches():
    task = sklearn_task(classifier(), (INPUTS, CLASSES), sample_seed=3)
    own = classifier(random_state=5)
    for batch in index_batches(PLAN, COUNT, 3):
        own.partial_fit(INPUTS[batch], CLASSES[batch], classes=[0, 1, 2])
    calls: list[tuple[int, int]] = []
    trained = task.train(task.init(0), PLAN, lambda *step: calls.append(step[:2]))
    np.testing.assert_allclose(trained.weights["coef_"], own.coef_, rtol=1e-12)
    np.testing.assert_allclose(trained.weights["intercept_"], own.intercept_, rtol=1e-12)
    assert calls == [(step, 24) for step in range(1, 25)]
    assert trained.num_examples == COUNT


@pytest.mark.parametrize(
    ("estimator", "targets", "first", "last"),
    [
        (SGDClassifier(loss="log_loss", alpha=0.01), CLASSES, np.log(3), 0.6),
        (Perceptron(), CLASSES, 1.0, 0.3),
        (SGDRegressor(), NUMBERS, float((NUMBERS**2).mean()), 0.1),
    ],
)
def test_rounds_of_training_learn(estimator, targets, first, last):
    task = sklearn_task(estimator, (INPUTS, targets), (INPUTS, targets))
    weights = task.init(0)
    assert task.evaluate(weights).loss <= first + 1e-9
    for number in range(1, 7):
        plan = RoundPlan(epochs=5, batch_size=8, seed=number, round=number)
        result = task.train(weights, plan, ignore)
        same_form(result.weights, weights)
        weights = result.weights
    found = task.evaluate(weights)
    assert found.loss < last
    assert found.loss == pytest.approx(result.metrics["loss"])
    assert set(found.metrics) == ({"accuracy"} if targets is CLASSES else set())


def test_a_training_depends_on_the_weights_and_the_plan_only():
    task = sklearn_task(classifier(), (INPUTS, CLASSES))
    weights = task.init(0)
    kept = {name: one.copy() for name, one in weights.items()}
    first = task.train(weights, PLAN, ignore).weights
    again = task.train(weights, PLAN, ignore).weights
    for name, one in first.items():
        assert np.array_equal(one, again[name])
        assert np.array_equal(weights[name], kept[name])


def test_the_plans_learning_rate_is_that_of_every_step():
    task = sklearn_task(SGDRegressor(alpha=0.0), (INPUTS[:1], NUMBERS[:1]))
    found = task.train(task.init(0), Plan(learning_rate=0.25), ignore).weights
    np.testing.assert_allclose(found["coef_"], 0.25 * NUMBERS[0] * INPUTS[0], rtol=1e-12)


def test_the_estimators_own_schedule_goes_on_from_round_to_round():
    data = INPUTS[:8], NUMBERS[:8]
    task = sklearn_task(SGDRegressor(learning_rate="invscaling"), data)
    alone = sklearn_task(SGDRegressor(learning_rate="invscaling"), data)
    weights = task.init(0)
    rounds = [
        task.train(weights, RoundPlan(epochs=2, batch_size=8, round=number), ignore).weights
        for number in (1, 2)
    ]
    own = SGDRegressor(learning_rate="invscaling", random_state=0)
    own.partial_fit(*(part[:1] for part in data))
    own.coef_, own.intercept_, own.t_ = np.zeros(FEATURES), np.zeros(1), 1.0 + 16
    for batch in index_batches(Plan(epochs=2, batch_size=8), 8, 0):
        own.partial_fit(data[0][batch], data[1][batch])
    np.testing.assert_allclose(rounds[1]["coef_"], own.coef_, rtol=1e-12)
    assert not np.allclose(rounds[0]["coef_"], rounds[1]["coef_"])
    late = alone.train(weights, RoundPlan(epochs=2, batch_size=8, round=2), ignore).weights
    assert np.array_equal(late["coef_"], rounds[1]["coef_"])


def test_a_worker_may_lack_classes_of_the_federation():
    few = CLASSES < 2
    task = sklearn_task(classifier(), (csr_matrix(INPUTS[few]), CLASSES[few]), classes=[0, 1, 2])
    assert task.classes == ("0", "1", "2")
    assert task.init(0)["coef_"].shape == (3, FEATURES)
    task.train(task.init(0), PLAN, ignore)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sklearn_task(LinearRegression(), (INPUTS, NUMBERS)), "with partial_fit"),
        (lambda: sklearn_task(classifier(average=True), (INPUTS, CLASSES)), "without average="),
        (lambda: sklearn_task(GaussianNB(), (INPUTS, CLASSES)), "GaussianNB lacks coef_ or"),
        (lambda: sklearn_task(classifier(), (INPUTS, CLASSES[1:])), "60 inputs and 59 targets"),
        (lambda: sklearn_task(classifier(), (INPUTS, 0 * CLASSES)), "class 0 .*with classes=$"),
        (
            lambda: sklearn_task(classifier(), (INPUTS, CLASSES), classes="012"),
            "classes= is '012'; expected a sequence of classes",
        ),
    ],
)
def test_what_cannot_be_trained_in_rounds_is_refused(make, message):
    with pytest.raises(TaskError, match=message):
        make()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (INPUTS, "train_data is of type ndarray; expected a pair"),
        ((INPUTS, CLASSES, CLASSES), "train_data is a tuple with 3 entries; expected a pair"),
        (
            (INPUTS.tolist(), CLASSES),
            "train_data contains .*; expected an array with one entry per example",
        ),
        ((INPUTS, 3), "60 inputs and 1 targets; expected one target for each"),
        ((INPUTS[:0], CLASSES[:0]), "train_data has no examples"),
        ((INPUTS, np.ma.masked_equal(CLASSES, 1)), "train_data contains a masked array; fill it"),
    ],
)
def test_data_that_are_no_pair_of_arrays_are_named(data, message):
    with pytest.raises(TaskError, match=message):
        sklearn_task(classifier(), data)


def test_the_classes_are_in_the_order_of_the_estimator_s_outputs():
    task = sklearn_task(classifier(), (INPUTS, CLASSES), classes=[2, 0, 1])
    assert task.classes == ("0", "1", "2")


@pytest.mark.parametrize("held_out", [False, True])
def test_an_example_without_a_class_is_named(held_out):
    x, y = np.zeros((4, 2)), np.array(["a", "b", "a", "b"], object)
    gaps = np.array(["a", None, "b", "a"], object)
    with pytest.raises(TaskError, match=r"of several types \(.*'NoneType'.*the same type"):
        sklearn_task(SGDClassifier(), (x, y if held_out else gaps), (x, gaps))


def test_a_class_may_be_among_the_held_out_examples_only():
    few = CLASSES < 2
    task = sklearn_task(classifier(), (INPUTS[few], CLASSES[few]), (INPUTS, CLASSES))
    assert task.classes == ("0", "1", "2")
    assert task.evaluate(task.init(0)).loss == pytest.approx(np.log(3))


@pytest.mark.parametrize("held_out", [CLASSES.astype(float), CLASSES[:, None]])
def test_held_out_targets_change_no_name_of_a_class(held_out):
    task = sklearn_task(classifier(), (INPUTS, CLASSES), (INPUTS, held_out))
    assert task.classes == ("0", "1", "2")


def test_a_loss_that_fails_costs_no_training():
    task = sklearn_task(classifier(), (INPUTS, CLASSES), loss=lambda *_: 1 / 0)
    notes: list[str] = []
    result = Results(notes.append).trained(task.train(task.init(0), PLAN, ignore))
    assert result.weights["coef_"].any()
    assert result.metrics == {"steps": 24}
    assert "the metric 'loss' of train() failed, so it is omitted: ZeroDivision" in notes[0]


def test_a_sparse_matrix_may_have_any_format():
    rows, entries = (trained_on(matrix) for matrix in (csr_matrix(INPUTS), coo_matrix(INPUTS)))
    assert np.array_equal(rows["coef_"], entries["coef_"])


def test_targets_may_be_a_list_of_names():
    names = [("north", "south", "west")[one] for one in CLASSES]
    task = sklearn_task(classifier(), (INPUTS, names), (INPUTS, names))
    assert task.classes == ("north", "south", "west")
    trained = task.train(task.init(0), PLAN, ignore)
    assert task.evaluate(trained.weights).metrics["accuracy"] > 0.8


def test_a_metric_that_fails_costs_no_other():
    def auc(estimator, inputs, targets):
        return roc_auc_score(targets, estimator.predict_proba(inputs)[:, 1])

    metrics = {"auc": auc, "one": lambda *_: 1.0}
    task = sklearn_task(classifier(), (INPUTS, CLASSES), (INPUTS, CLASSES), metrics=metrics)
    weights, notes = task.train(task.init(0), PLAN, ignore).weights, []
    result = Results(notes.append).evaluated(lambda: task.evaluate(weights))
    assert result.metrics == {"one": 1.0}
    assert result.num_examples == COUNT
    (note,) = notes
    assert note.startswith("the metric 'auc' of evaluate() failed, so it is omitted: ValueError: ")


@pytest.mark.parametrize("inputs", [INPUTS, csr_matrix(INPUTS)])
def test_a_part_is_a_task_on_its_examples_with_the_classes_of_the_whole(inputs):
    whole = sklearn_task(classifier(), (inputs, CLASSES), (inputs, CLASSES))
    rows = np.flatnonzero(CLASSES == 1)
    part, alone = (
        whole.part(rows, 3),
        sklearn_task(classifier(), (inputs[rows], CLASSES[rows]), classes=range(3), sample_seed=3),
    )
    trained = part.train(whole.init(0), PLAN, ignore)
    expected = alone.train(whole.init(0), PLAN, ignore)
    np.testing.assert_array_equal(trained.weights["coef_"], expected.weights["coef_"])
    assert (trained.num_examples, part.evaluate(trained.weights)) == (len(rows), None)
    assert (whole.num_examples, whole.labels.tolist()) == (COUNT, CLASSES.tolist())
