"""What the adapters of Flax and PyTorch share: the examples, their parts, and the results."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.protocol.metric_names import PERSONAL_PREFIX
from fluffle_common.tensors.weights import Array, Weights
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.persistent_tensors import PersistentTensors
from fluffle_worker.task import EvalResult, FailedMetric, Progress, TrainResult, measured, work_of
from fluffle_worker.tasks.checks import check_seed
from fluffle_worker.tasks.examples import (
    Examples,
    InMemory,
    Stream,
    Streamed,
    arrays_in,
    count_of,
    joined,
)

Loss = Callable[[Any, Any], Any]
EVALUATION_BATCH = 256


class AdaptedTask(ABC):
    """A task that trains and scores a model of some framework on a data owner's examples."""

    only_reads = True
    # Of the framework: the value of an array in NumPy, a function applied to each array of the
    # examples, one applied to the arrays in several outputs, and the concatenation of arrays.
    _as_array: ClassVar[Callable[..., Any]]
    _map_arrays: ClassVar[Callable[..., Any]]
    _map_trees: ClassVar[Callable[..., Any]]
    _concatenate: ClassVar[Callable[..., Any]]
    local_rule: BoundRule
    _loss: Loss
    _metrics: Mapping[str, Loss]
    _score_trained: bool
    _valid: Any

    def _take_examples(
        self,
        train_data: Examples | Stream,
        valid_data: Examples | None,
        num_examples: int | None,
        sample_seed: int,
    ) -> None:
        check_seed(sample_seed)
        self.whole, map_arrays = self, self._map_arrays
        self._data: InMemory | Streamed
        if callable(train_data):
            self._data = Streamed(train_data, num_examples, sample_seed, map_arrays)
        else:
            source = self._on_device(train_data, "train_data")
            count = count_of(arrays_in(source, map_arrays), "train_data")
            self._data = InMemory(source, count, sample_seed)
        self.num_examples, self._sample_seed = self._data.num_examples, sample_seed
        self._valid, self._held_out = None, 0
        if valid_data is not None:
            self._valid = self._on_device(valid_data, "valid_data")
            self._held_out = count_of(arrays_in(self._valid, map_arrays), "valid_data")
        self._personal = PersistentTensors()

    def _share_frozen(self, share_frozen: bool) -> None:
        self.share_frozen = share_frozen
        if share_frozen and not self.frozen():
            raise TaskError(
                "frozen= selects no tensor, so share_frozen= has no effect; remove share_frozen="
            )

    @property
    def labels(self) -> Array:
        """The targets of the training examples, by which ``fluffle.simulation`` partitions them."""
        return joined([self._as_array(one) for one in self._data.targets()])

    def keep_in(self, folder: Path) -> None:
        """Keep the personal tensors in this folder, so that they outlive a restart."""
        self._personal = PersistentTensors(folder, "personal")

    def part(self, rows: Array, sample_seed: int) -> Self:
        """Return a task on a subset of the training examples, without held-out data.

        Parts share the examples and the model, so a thousand of them are cheap.

        Args:
            rows: indices of the part's examples, shape [part size].
            sample_seed: decorrelates the part's batches from those of other parts.
        """
        made = copy.copy(self)
        made.whole, made._data = self, self._data.part(rows, sample_seed)
        made.num_examples, made._sample_seed = len(rows), sample_seed
        made._valid, made._held_out, made._personal = None, 0, PersistentTensors()
        made.local_rule = self.local_rule.anew()
        return made

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Evaluate ``weights``, with the latest personal tensors; None without held-out data."""
        if not self._held_out:
            return None
        scores = self._scores(weights, self._latest_personal())
        return EvalResult(scores.pop("loss"), self._held_out, scores)

    def _latest_personal(self) -> Weights:
        return self._personal.latest(self.local_rule.run)

    def _result(
        self, plan: Plan, trained: Weights, personal: Weights, losses: StepLosses
    ) -> TrainResult:
        """Keep the personal tensors of a training, and return its result."""
        self._personal.keep(work_of(plan), personal)
        metrics = losses.metrics()
        if self._score_trained and self._held_out:
            scores = self._scores(trained, personal)
            metrics |= {f"{PERSONAL_PREFIX}{name}": value for name, value in scores.items()}
        return TrainResult(trained, self.num_examples, metrics)

    @abstractmethod
    def frozen(self) -> Weights:
        """Return the frozen tensors."""

    @abstractmethod
    def _on_device(self, data: Examples, what: str) -> Any:
        """Return examples, which ``what`` names in errors, on the device."""

    @abstractmethod
    def _scores(self, weights: Weights, personal: Weights) -> dict[str, float]:
        """Return the mean loss and metrics of a model on the held-out data."""

    def _means(self, outputs_of: Callable[[Array], tuple[Any, Any]]) -> dict[str, float]:
        """Return the mean loss and metrics over the held-out examples, batch by batch.

        A metric that is one number, such as a precision, is not the mean of the batches'
        precisions: it is computed from all outputs at once, unless these cannot be concatenated.

        ``outputs_of`` returns the model's outputs and the targets of the examples with the given
        indices.
        """

        def joined_rows(*parts: Any) -> Any:
            every = self._concatenate(parts)
            if len(every) != self._held_out:
                raise ValueError
            return every

        functions = {"loss": self._loss, **self._metrics}
        totals = dict.fromkeys(functions, 0.0)
        failed: dict[str, float] = {}
        whole, kept = set(), []  # metrics that may need all examples, and what they are given
        for start in range(0, self._held_out, EVALUATION_BATCH):
            rows = np.arange(start, min(start + EVALUATION_BATCH, self._held_out))
            outputs, targets = outputs_of(rows)
            for name, function in functions.items():
                try:
                    values = np.asarray(self._as_array(function(outputs, targets)), np.float64)
                except Exception as why:  # costs this metric, not the evaluation
                    if name == "loss":
                        raise
                    failed[name], values = FailedMetric(why), np.zeros(())
                if not start and not values.shape and name != "loss":
                    whole.add(name)
                totals[name] += float(values.mean()) * len(rows)
            if whole:
                kept.append((outputs, targets))
        found = {name: total / self._held_out for name, total in totals.items()} | failed
        if len(kept) > 1:
            try:
                outputs, targets = self._map_trees(joined_rows, *kept)
            except (RuntimeError, TypeError, ValueError):  # one has no row for each example
                return found
            for name in whole:
                found[name] = measured(self._metrics[name], outputs, targets)
        return found


class StepLosses:
    """Collects the loss of each step, and reports the progress.

    Reading a loss waits until the device has computed it. So each step reads the loss of the
    previous one: this bounds how far the device lags behind the reported progress, without stalling
    the current step.

    ``progress`` is called after each step, with the step, the steps and the previous step's loss.
    If ``private``, no loss is reported, because a loss is not noised.
    """

    def __init__(self, progress: Progress, steps: int, *, private: bool) -> None:
        self._progress, self._steps, self._private = progress, steps, private
        self._losses: list[Any] = []

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: Any) -> None:
        """Add the loss of the step that was just begun, a number of the framework."""
        previous: float | None = None
        if self._losses:  # keeps only the last one on the device
            previous = self._losses[-1] = float(self._losses[-1])
        self._losses.append(loss)
        done = len(self._losses)
        self._progress(done, max(done, self._steps), None if self._private else previous)

    def metrics(self) -> dict[str, float]:
        """Return the number of steps and, unless it is private, the mean loss."""
        metrics = {"steps": float(len(self._losses))}
        if not self._private:
            metrics["loss"] = float(np.mean([float(one) for one in self._losses]))
        return metrics
