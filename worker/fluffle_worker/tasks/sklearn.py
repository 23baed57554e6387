"""Adapter that makes a task from a linear scikit-learn estimator with ``partial_fit``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import is_classifier
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error

from fluffle_common.cli.user_values import shown
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Array, Weights
from fluffle_worker.task import EvalResult, Progress, RoundPlan, TrainResult, measured
from fluffle_worker.tasks.checks import (
    as_metrics,
    check_pair,
    check_seed,
    check_unmasked,
    checked_array,
)
from fluffle_worker.tasks.examples import batch_size_of, index_batches, steps_of

Score = Callable[[Any, Any, Any], float]
_TENSORS = ("coef_", "intercept_")


class SklearnTask:
    """A task that trains and evaluates a linear scikit-learn estimator.

    The tensors ``coef_`` and ``intercept_`` travel. All other state is reset in each round, except
    the update counter ``t_``, on which the estimator's learning-rate schedule depends: it is set as
    if this worker had trained in every previous round.

    Args:
        estimator: an unfitted estimator, such as ``SGDClassifier(loss="log_loss")``.
        train_data: (inputs, targets); inputs are an array or sparse matrix of shape [n, features].
        valid_data: held-out data of the same form. If None, this worker does not evaluate.
        classes: all classes of the federation, for a classifier; by default, those of its own data.
        loss: ``(estimator, inputs, targets) -> loss``. The default is the log loss for a classifier
            with ``predict_proba``, the error rate for other classifiers, and the mean squared error
            for a regressor.
        metrics: further functions with that signature; by default, ``accuracy`` for a classifier.
        sample_seed: decorrelates this worker's batches from those of other workers.

    Raises:
        TaskError: if the estimator cannot be federated, or another argument is unusable.
    """

    only_reads = True

    def __init__(
        self,
        estimator: Any,
        train_data: tuple[Any, Any],
        valid_data: tuple[Any, Any] | None = None,
        *,
        classes: Sequence[Any] | None = None,
        loss: Score | None = None,
        metrics: Mapping[str, Score] | None = None,
        sample_seed: int = 0,
    ) -> None:
        kind = type(estimator).__name__
        if not callable(getattr(estimator, "partial_fit", None)) or getattr(
            estimator, "average", False
        ):
            raise TaskError(
                f"{kind} cannot be federated; expected an estimator with partial_fit() and "
                "without average=, such as SGDClassifier"
            )
        inputs, targets = self._train = _checked(train_data, "train_data")
        self._valid = None if valid_data is None else _checked(valid_data, "valid_data")
        self.num_examples, self._sample_seed = len(targets), sample_seed
        check_seed(sample_seed)
        if not self.num_examples:
            raise TaskError("train_data has no examples; expected at least one example")
        classifies = is_classifier(estimator)
        self._loss = loss or (_log_loss_or_error if classifies else _squared_error)
        own = {"accuracy": _accuracy} if metrics is None and classifies else metrics
        self._metrics = as_metrics(own)
        first: dict[str, Any] = {}
        if classifies:
            held_out = targets[:0] if self._valid is None else self._valid[1]
            first = {"classes": _classes(classes, targets, held_out)}
        self._fresh = copy.deepcopy(estimator).partial_fit(inputs[:1], targets[:1], **first)
        if classifies:
            self.classes = tuple(map(str, self._fresh.classes_))
        if not all(isinstance(getattr(self._fresh, name, None), np.ndarray) for name in _TENSORS):
            raise TaskError(
                f"{kind} lacks coef_ or intercept_ after fitting; expected a linear "
                "estimator, such as SGDClassifier"
            )

    @property
    def labels(self) -> Array:
        """The targets of the training examples, by which ``fluffle.simulation`` partitions them."""
        targets: Array = self._train[1]
        return targets

    def part(self, rows: Array, sample_seed: int) -> Self:
        """Return a task on a subset of the training examples; see ``AdaptedTask.part``."""
        made = copy.copy(self)
        made._train, made._valid = (self._train[0][rows], self._train[1][rows]), None
        made.num_examples, made._sample_seed = len(rows), sample_seed
        return made

    def init(self, seed: int) -> Weights:
        """Return zeros, with which these estimators start, whatever the seed."""
        return {name: np.zeros_like(getattr(self._fresh, name)) for name in _TENSORS}

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """Train from ``weights``; a learning rate in the plan replaces the estimator's schedule."""
        estimator = self._with(weights)
        changes: dict[str, Any] = {"random_state": plan.seed % 2**32}
        if plan.learning_rate is not None:
            changes |= {"eta0": plan.learning_rate, "learning_rate": "constant"}
        known = estimator.get_params()
        estimator.set_params(**{name: value for name, value in changes.items() if name in known})
        inputs, targets = self._train
        steps = steps_of(plan, self.num_examples)
        if hasattr(estimator, "t_") and isinstance(plan, RoundPlan):
            before = max(plan.round - 1, 0) * steps * batch_size_of(plan, self.num_examples)
            estimator.t_ = 1.0 + before
        batches = index_batches(plan, self.num_examples, self._sample_seed)
        for step, batch in enumerate(batches, start=1):
            estimator.partial_fit(inputs[batch], targets[batch])
            progress(step, steps, None)
        trained = {name: getattr(estimator, name) for name in _TENSORS}
        metrics = {"loss": measured(self._loss, estimator, inputs, targets), "steps": steps}
        return TrainResult(trained, self.num_examples, metrics)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Evaluate ``weights`` on the held-out data; return None if there is none."""
        if self._valid is None or not len(self._valid[1]):
            return None
        estimator = self._with(weights)
        metrics = {
            name: measured(metric, estimator, *self._valid)
            for name, metric in self._metrics.items()
        }
        loss = float(self._loss(estimator, *self._valid))
        return EvalResult(loss, len(self._valid[1]), metrics)

    def _with(self, weights: Mapping[str, Array]) -> Any:
        """Return a fresh estimator with these weights and its update counter reset."""
        estimator = copy.deepcopy(self._fresh)
        for name in _TENSORS:
            setattr(estimator, name, np.array(weights[name]))
        if hasattr(estimator, "t_"):
            estimator.t_ = 1.0
        return estimator


sklearn_task = SklearnTask
"""The public name, as in ``fluffle.sklearn_task``."""


def _checked(data: Any, what: str) -> tuple[Any, Any]:
    """Return inputs and targets as arrays; the inputs may be a sparse matrix."""
    check_pair(data, what)
    check_unmasked(data[1], what)
    inputs, targets = checked_array(data[0], what), np.asarray(data[1])
    if hasattr(inputs, "tocsr"):  # a sparse matrix, of whose formats not all can be indexed
        inputs = inputs.tocsr()
    if not targets.shape or inputs.shape[0] != len(targets):
        raise TaskError(
            f"{what} has {inputs.shape[0]} inputs and {targets.size} targets; expected one "
            "target for each input"
        )
    return inputs, targets


def _classes(given: Sequence[Any] | None, targets: Array, held_out: Array) -> Array:
    """Return the given classes; by default, those of the targets."""
    try:
        classes = np.unique(targets) if given is None else np.asarray(given)
        if classes.ndim != 1:
            raise TaskError(f"classes= is {shown(given)}; expected a sequence of classes")
        more = np.setdiff1d(held_out, classes)
    except TypeError as why:
        raise TaskError(
            f"the classes of the examples are of several types ({why}); give every example a class "
            "of the same type, and leave out those without a class"
        ) from None
    if given is None and len(more):  # else they keep their dtype, and so their names
        classes = np.union1d(classes, more)
    if len(classes) == 1:
        raise TaskError(
            f"only the class {classes[0]} is known; give all classes of the federation with "
            "classes="
        )
    return classes


def _log_loss_or_error(estimator: Any, inputs: Any, targets: Any) -> float:
    if hasattr(estimator, "predict_proba"):
        labels = estimator.classes_
        return float(log_loss(targets, estimator.predict_proba(inputs), labels=labels))
    return 1 - _accuracy(estimator, inputs, targets)


def _accuracy(estimator: Any, inputs: Any, targets: Any) -> float:
    return float(accuracy_score(targets, estimator.predict(inputs)))


def _squared_error(estimator: Any, inputs: Any, targets: Any) -> float:
    return float(mean_squared_error(targets, estimator.predict(inputs)))
