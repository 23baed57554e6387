"""Validation and conversion of what a task's code returns.

Tasks return whatever their framework produces: ``np.int64``, arrays of one element, NaN, None, a
hundred metrics. Usable values are converted, unusable ones are left out and reported once. It is an
error only if no valid update remains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fluffle_common.cli.user_code import full_trace, one_line, sendable
from fluffle_common.cli.user_values import count, number, shown
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import MAX_METRIC_NAME, MAX_METRICS, MAX_NUM_EXAMPLES
from fluffle_common.tensors.layout import Tensors
from fluffle_common.tensors.weights import Array, Weights
from fluffle_worker.task import EvalResult, Task, TrainResult
from fluffle_worker.user_code import FailedMetric

_FIRST = ("loss", "accuracy")  # kept if there are too many metrics
_MAX_REPORTS = 1000


class Results:
    """Converts what a task returns and reports each distinct fault once.

    ``report`` is called with a sentence about each value that is left out, ``trace`` with the
    traceback of each error in the task's code.
    """

    def __init__(
        self,
        report: Callable[[str], object] = lambda _: None,
        trace: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._report, self._trace = report, trace
        self._reported: set[str] = set()

    def trained(self, result: Any) -> TrainResult:
        """Return the checked result of ``train``.

        Raises:
            TaskError: if the weights or ``num_examples`` are missing or invalid.
        """
        if not hasattr(result, "weights") or not hasattr(result, "num_examples"):
            raise TaskError(
                f"train() returned {shown(result)}; expected TrainResult(weights, num_examples, "
                "metrics)"
            )
        try:
            num_examples = count(result.num_examples)
        except ValueError as wrong:
            raise TaskError(f"train() returned an invalid num_examples: {wrong}") from None
        if not 1 <= num_examples <= MAX_NUM_EXAMPLES:
            raise TaskError(
                f"train() returned num_examples {shown(num_examples)}; expected the number of "
                f"examples that were used for training, from 1 to {MAX_NUM_EXAMPLES}"
            )
        metrics = self._metrics("train", getattr(result, "metrics", None))
        extra = arrays(getattr(result, "extra", None) or {}, "train()", "the extra tensors")
        return TrainResult(arrays(result.weights, "train()"), num_examples, metrics, extra)

    def evaluated(self, evaluate: Callable[[], Any]) -> EvalResult | None:
        """Call a task's evaluation and return its checked result; None if the task has none.

        If the evaluation raises or returns an unusable result, return one of 0 examples, so that
        training continues without it.
        """
        nothing = EvalResult(0.0, 0)
        try:
            result = evaluate()
        except BaseException as why:
            self.failed(why)
            self._once(
                f"evaluate() failed, so this worker trains without evaluation: {one_line(why)}"
            )
            return nothing
        if result is None:
            return None
        try:
            num_examples = count(result.num_examples)
            loss = number(result.loss)
        except AttributeError:
            self._once(
                f"evaluate() returned {shown(result)}, but must return "
                "EvalResult(loss, num_examples, metrics) or None; this worker reports no evaluation"
            )
            return nothing
        except ValueError as wrong:
            self._once(
                f"evaluate() returned an invalid loss or num_examples: {wrong}; this worker does "
                "not report such evaluations"
            )
            return nothing
        if not 0 <= num_examples <= MAX_NUM_EXAMPLES:
            self._once(
                f"evaluate() returned num_examples {shown(num_examples)}; expected the number of "
                f"examples evaluated on, from 0 to {MAX_NUM_EXAMPLES}; this worker does not report "
                "such evaluations"
            )
            return nothing
        if num_examples == 0:
            return nothing
        metrics = self._metrics("evaluate", getattr(result, "metrics", None))
        return EvalResult(loss, num_examples, metrics)

    def step(self, number_: Any, steps: Any, loss: Any) -> tuple[int, int, float | None]:
        """Return the checked arguments of a ``progress`` call; an invalid loss becomes None."""
        if loss is not None:
            try:
                loss = number(loss)
            except ValueError as wrong:
                self._once(
                    f"the loss of a training step is invalid: {wrong}; invalid losses are not shown"
                )
                loss = None
        return _whole(number_), _whole(steps), loss

    def failed(self, why: BaseException) -> None:
        """Report the traceback of an error in the task's code, once."""
        own = why.__cause__ if isinstance(why, TaskError) else why
        if own is not None and self._new(f"trace: {one_line(own)}"):
            self._trace(full_trace(own))

    def _metrics(self, method: str, given: Any) -> dict[str, float]:
        if given is None:
            return {}
        try:
            pairs = list(dict(given).items())
        except (TypeError, ValueError):
            self._once(
                f"{method}() returned the metrics {shown(given)}, but must return a mapping of "
                "names to numbers; the metrics are omitted"
            )
            return {}
        valid: dict[str, float] = {}
        for given_name, value in pairs:
            name = _metric_name(given_name)
            if isinstance(value, FailedMetric):
                self.failed(value.why)
                self._once(
                    f"the metric '{name}' of {method}() failed, so it is omitted: "
                    f"{one_line(value.why)}",
                    key=f"{method} {name}",
                )
                continue
            try:
                valid[name] = number(value)
            except ValueError as wrong:
                self._once(
                    f"the metric '{name}' of {method}() is invalid: {wrong}; invalid values "
                    "are omitted",
                    key=f"{method} {name}",
                )
        if len(valid) > MAX_METRICS:
            dropped = len(valid) - MAX_METRICS
            self._once(
                f"{method}() returned {len(valid)} metrics; at most {MAX_METRICS} can be sent, so "
                f"the last {dropped} are omitted"
            )
            names = [name for name in _FIRST if name in valid]
            names += [name for name in valid if name not in _FIRST]
            valid = {name: valid[name] for name in names[:MAX_METRICS]}
        return valid

    def _once(self, sentence: str, key: str | None = None) -> None:
        """Report a sentence unless one with the same key, by default the same one, was reported."""
        if self._new(sentence if key is None else key):
            self._report(sentence)

    def _new(self, key: str) -> bool:
        if key in self._reported or len(self._reported) >= _MAX_REPORTS:
            return False
        self._reported.add(key)
        return True


def arrays(given: Any, method: str, what: str = "the weights") -> dict[str, Array]:
    """Convert tensors that a task's method returned to NumPy arrays; ``what`` is for errors.

    Raises:
        TaskError: if ``given`` is not a mapping or NumPy cannot convert a tensor.
    """
    if not isinstance(given, Mapping):
        raise TaskError(
            f"{method} returned {shown(given)} as {what}; expected a mapping of names to arrays"
        )
    converted = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            inner = "/".join(map(str, [name, *list(value)[:1]]))
            raise TaskError(
                f"{method} returned {what} with a nested mapping under "
                f"'{sendable(str(name), 60)}'; expected a flat mapping of names to arrays, with "
                f"names such as '{sendable(inner, 60)}'"
            )
        try:
            converted[name] = np.asarray(value)
        except Exception as why:
            raise TaskError(
                f"{method} returned tensor '{sendable(str(name), 60)}' as a "
                f"{type(value).__name__}, which NumPy "
                f"cannot convert to an array: {one_line(why)}"
            ) from None
    return converted


def lent(weights: Weights, task: Task) -> dict[str, Array]:
    """Return the tensors to pass to a task: copies, or views if the task has ``only_reads``.

    NumPy's read-only flag would not protect views: ``torch.from_numpy`` and C code ignore it. A
    task that modified the received weights in place would then send a delta of zeros.
    """
    if getattr(task, "only_reads", False):
        return dict(weights)
    if isinstance(weights, Tensors) and weights.memory:  # one contiguous block: one copy
        memory = np.frombuffer(weights.memory, np.uint8).copy().data
        return dict(weights.layout.over(memory))
    return copied(weights)


def copied(weights: Weights) -> dict[str, Array]:
    """Return copies of tensors."""
    return {name: np.array(tensor) for name, tensor in weights.items()}


def _whole(value: Any) -> int:
    try:
        return max(0, count(value))
    except ValueError:
        return 0


def _metric_name(given: Any) -> str:
    """Return a metric's name on the wire; a long name is cut and ends in its hash."""
    name = sendable(str(given))
    if len(name) <= MAX_METRIC_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_METRIC_NAME - 9]}~{digest}"
