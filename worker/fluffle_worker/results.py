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

from fluffle_common.cli.user_values import count, number, shown
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import MAX_METRIC_NAME, MAX_METRICS, MAX_NUM_EXAMPLES
from fluffle_common.tensors.layout import Tensors
from fluffle_common.tensors.weights import Array, Weights
from fluffle_common.user_errors import full_trace, one_line, sendable
from fluffle_worker.task import EvalResult, FailedMetric, Task, TrainResult

_MOST_STEPS = 2**63 - 1  # msgpack has no longer integers
_FIRST = ("loss", "accuracy")  # kept if there are too many metrics
_MAX_REPORTS = 1000
_NOTHING = EvalResult(0.0, 0)  # an evaluation on no examples


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
            raise TaskError(f"train() returned num_examples {wrong}") from None
        if not 1 <= num_examples <= MAX_NUM_EXAMPLES:
            raise TaskError(
                f"train() returned num_examples {shown(num_examples)}; expected the number of "
                f"examples that were used for training, from 1 to {MAX_NUM_EXAMPLES}"
            )
        metrics = self._metrics("train", result)
        extra = getattr(result, "extra", None)
        extra = {} if extra is None else arrays(extra, "train()", "the extra tensors")
        return TrainResult(arrays(result.weights, "train()"), num_examples, metrics, extra)

    def evaluated(self, evaluate: Callable[[], Any]) -> EvalResult | None:
        """Call a task's evaluation and return its checked result; None if the task has none.

        If the evaluation raises or returns an unusable result, return one of 0 examples, so that
        training continues without it.
        """
        try:
            result = evaluate()
        except BaseException as why:
            what = "evaluate() failed, so this worker trains without evaluation"
            self.once(f"evaluate {type(why).__name__}", what, why)
            return _NOTHING
        if result is None:
            return None
        try:
            given = result.num_examples, result.loss
        except BaseException as why:  # some compute their values only now
            expected = "expected EvalResult(loss, num_examples, metrics) or None"
            return self._unfit(f"{shown(result)} ({one_line(why)}); {expected}")
        what = "num_examples"
        try:
            num_examples = count(given[0])
            if not 0 <= num_examples <= MAX_NUM_EXAMPLES:
                raise ValueError(f"{shown(num_examples)}; expected 0 to {MAX_NUM_EXAMPLES}")
            what = "the loss"
            loss = number(given[1])
        except ValueError as wrong:
            return self._unfit(f"{what} {wrong}")
        if num_examples == 0:
            return _NOTHING
        return EvalResult(loss, num_examples, self._metrics("evaluate", result))

    def _unfit(self, returned: str) -> EvalResult:
        self.once("evaluate result", f"an evaluation is omitted: evaluate() returned {returned}")
        return _NOTHING

    def step(self, number_: Any, steps: Any, loss: Any) -> tuple[int, int, float | None]:
        """Return the checked arguments of a ``progress`` call; an invalid loss becomes None."""
        if loss is not None:
            try:
                loss = number(loss)
            except ValueError as wrong:
                self.once("loss", f"the loss of a training step is not shown: it is {wrong}")
                loss = None
        return _whole(number_), _whole(steps), loss

    def failed(self, why: BaseException) -> str:
        """Report the traceback of an error in the task's code, once; return the error in one line.

        Never raises: otherwise, the training thread would end, and the worker would wait for ever.
        """
        try:
            own = why.__cause__ if isinstance(why, TaskError) else why
            if own is not None and self._is_new(f"trace: {one_line(own)}"):
                self._trace(full_trace(own))
            return one_line(why)
        except BaseException:  # its attributes fail, or there is no memory to describe it
            return type(why).__name__

    def _metrics(self, method: str, result: Any) -> dict[str, float]:
        try:
            given = getattr(result, "metrics", None)
            pairs = [] if given is None else list(dict(given).items())
        except Exception as why:  # some compute their values only now
            what = f"the metrics of {method}() are omitted: expected a mapping of names to numbers"
            self.once(f"{method} metrics", f"{what} ({one_line(why)})")
            return {}
        valid: dict[str, float] = {}
        for given_name, value in pairs:
            name = _metric_name(given_name)
            if not name.strip():
                self.once(
                    f"{method} no name",
                    f"{method}() returned a metric with the empty name {name!r}, which is omitted",
                )
                continue
            key, metric = f"{method} metric {name}", f"the metric '{name}' of {method}()"
            if isinstance(value, FailedMetric):
                self.once(key, f"{metric} failed, so it is omitted", value.why)
                continue
            try:
                valid[name] = number(value)
            except ValueError as wrong:
                self.once(key, f"{metric} is omitted: it is {wrong}")
        if len(valid) > MAX_METRICS:
            self.once(
                f"{method} number of metrics",
                f"{method}() returned {len(valid)} metrics; at most {MAX_METRICS} can be sent, so "
                f"the last {len(valid) - MAX_METRICS} are omitted",
            )
            names = sorted(valid, key=lambda name: name not in _FIRST)
            valid = {name: valid[name] for name in names[:MAX_METRICS]}
        return valid

    def once(self, key: str, what: str, why: BaseException | None = None) -> None:
        """Report a fault, with the error in the task's code that is its cause, if there is one.

        The key is the kind of the fault: the value in a sentence may differ in every step.
        """
        if not self._is_new(key):
            return
        if why is not None:
            what = f"{what}: {self.failed(why)}"
        self._report(what)

    def _is_new(self, key: str) -> bool:
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
    return {
        name: value if type(value) is np.ndarray else _array(name, value, method, what)
        for name, value in given.items()
    }


def _array(name: Any, value: Any, method: str, what: str) -> Array:
    if isinstance(value, Mapping):
        inner = "/".join(map(str, [name, *list(value)[:1]]))
        raise TaskError(
            f"{method} returned {what} with a nested mapping under '{sendable(str(name), 60)}'; "
            "expected a flat mapping of names to arrays, with names such as "
            f"'{sendable(inner, 60)}'"
        )
    try:
        array = np.asarray(value)
    except Exception as why:
        raise TaskError(
            f"{method} returned tensor '{sendable(str(name), 60)}' as a {type(value).__name__}, "
            f"which NumPy cannot convert to an array: {one_line(why)}"
        ) from None
    if array.dtype == object or isinstance(value, np.ma.MaskedArray):  # asarray drops the mask
        raise TaskError(
            f"{method} returned tensor '{sendable(str(name), 60)}' as {shown(value)}; expected an "
            "unmasked array of numbers"
        )
    return array


def lent(weights: Weights, task: Task) -> dict[str, Array]:
    """Return the tensors to pass to a task: copies, or views if the task has ``only_reads``.

    NumPy's read-only flag would not protect views: ``torch.from_numpy`` and C code ignore it. A
    task that modified the received weights in place would then send a delta of zeros.
    """
    if getattr(task, "only_reads", False):
        return dict(weights.items())
    if isinstance(weights, Tensors) and weights.memory:  # one contiguous block: one copy
        memory = np.frombuffer(weights.memory, np.uint8).copy().data
        return weights.layout.over(memory).as_dict
    return copied(weights)


def copied(weights: Weights) -> dict[str, Array]:
    """Return copies of tensors."""
    return {name: np.array(tensor) for name, tensor in weights.items()}


def _whole(value: Any) -> int:
    try:
        return min(max(0, count(value)), _MOST_STEPS)
    except ValueError:
        return 0


def _metric_name(given: Any) -> str:
    """Return a metric's name on the wire; a long name is cut and ends in its hash."""
    try:
        name = sendable(str(given))
    except Exception:  # its own __str__ fails
        name = shown(given)
    if len(name) <= MAX_METRIC_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_METRIC_NAME - 9]}~{digest}"
