"""What a task returns, made fit for the wire in one place.

Tasks return what their framework gives them: ``np.int64``, arrays of one element, NaN, None, a
hundred metrics. What is fit for use is used; what is not is left out and named once; only what
makes an update worthless is an error.
"""

from __future__ import annotations

import hashlib
import math
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import MAX_METRIC_NAME, MAX_METRICS, MAX_NUM_EXAMPLES
from fluffle_common.tensors.layout import Tensors
from fluffle_common.tensors.weights import Array, Weights, as_dict
from fluffle_worker.task import EvalResult, Task, TrainResult
from fluffle_worker.user_code import full_trace, one_line, sendable

_FIRST = ("loss", "accuracy")  # what is kept whatever else there is
_MOST_SAID = 1000


def ignore(*_: object) -> None:
    """Say it to nobody."""


class Results:
    """Takes what a task returns.

    Args:
        say: told, once, of each thing that is left out.
        trace: told of the traceback of each error of the task's code, once.
    """

    def __init__(
        self, say: Callable[[str], object] = ignore, trace: Callable[[str], object] = ignore
    ) -> None:
        self._say, self._trace = say, trace
        self._said: set[str] = set()

    def trained(self, found: Any) -> TrainResult:
        """Return what ``train`` returned.

        Raises:
            TaskError: where there is no update in it.
        """
        if not hasattr(found, "weights") or not hasattr(found, "num_examples"):
            raise TaskError(
                f"train() returned {_shown(found)}; it must return TrainResult(weights, "
                "num_examples, metrics)"
            )
        try:
            num_examples = count(found.num_examples)
        except ValueError as wrong:
            raise TaskError(f"train() returned num_examples that {wrong}") from None
        if not 1 <= num_examples <= MAX_NUM_EXAMPLES:
            raise TaskError(
                f"train() returned num_examples {num_examples}; from 1 to {MAX_NUM_EXAMPLES} is "
                "expected: on how many examples these weights were trained"
            )
        metrics = self._metrics("train", getattr(found, "metrics", None))
        extra = arrays(getattr(found, "extra", None) or {}, "train()", "the extra tensors")
        return TrainResult(arrays(found.weights, "train()"), num_examples, metrics, extra)

    def evaluated(self, evaluate: Callable[[], Any]) -> EvalResult | None:
        """Return what ``evaluate`` returns; a result of no examples where it is of no use.

        Whatever it raises, training goes on without it.
        """
        nothing = EvalResult(0.0, 0)
        try:
            found = evaluate()
        except BaseException as why:
            self.failed(why)
            self._once(f"evaluate() fails, and this worker trains without it: {one_line(why)}")
            return nothing
        if found is None:
            return None
        try:
            num_examples = count(found.num_examples)
            loss = number(found.loss)
        except AttributeError:
            self._once(
                f"evaluate() returned {_shown(found)}; EvalResult(loss, num_examples, metrics) or "
                "None is expected; there is no evaluation of this worker"
            )
            return nothing
        except ValueError as wrong:
            self._once(
                f"evaluate() returned a loss or num_examples that {wrong}; there is no evaluation "
                "of this worker where that is so"
            )
            return nothing
        if not 0 < num_examples <= MAX_NUM_EXAMPLES:
            return nothing
        metrics = self._metrics("evaluate", getattr(found, "metrics", None))
        return EvalResult(loss, num_examples, metrics)

    def step(self, number_: Any, steps: Any, loss: Any) -> tuple[int, int, float | None]:
        """Return what a task says of its progress; a loss that is not a number is none."""
        if loss is not None:
            try:
                loss = number(loss)
            except ValueError as wrong:
                self._once(f"the loss of a training step {wrong}; it is not shown")
                loss = None
        return _whole(number_), _whole(steps), loss

    def failed(self, why: BaseException) -> None:
        """Show the traceback of an error of the task's code, unless it is known already."""
        own = why.__cause__ if isinstance(why, TaskError) else why
        if own is not None and self._new(f"trace: {one_line(own)}"):
            self._trace(full_trace(own))

    def _metrics(self, whose: str, given: Any) -> dict[str, float]:
        if given is None:
            return {}
        try:
            pairs = list(dict(given).items())
        except (TypeError, ValueError):
            self._once(
                f"the metrics of {whose}() are {_shown(given)}, a mapping of names to numbers is "
                "expected; they are left out"
            )
            return {}
        fit: dict[str, float] = {}
        for given_name, value in pairs:
            name = _metric_name(given_name)
            try:
                fit[name] = number(value)
            except ValueError as wrong:
                self._once_of(f"{whose} {name}", f"the metric '{name}' of {whose}() {wrong}")
        if len(fit) > MAX_METRICS:
            dropped = len(fit) - MAX_METRICS
            self._once(
                f"{whose}() returns {len(fit)} metrics, and {MAX_METRICS} travel; the last "
                f"{dropped} are left out"
            )
            names = [name for name in _FIRST if name in fit]
            names += [name for name in fit if name not in _FIRST]
            fit = {name: fit[name] for name in names[:MAX_METRICS]}
        return fit

    def _once(self, what: str) -> None:
        if self._new(what):
            self._say(what)

    def _once_of(self, key: str, what: str) -> None:
        if self._new(key):
            self._say(f"{what}; it is left out where that is so")

    def _new(self, key: str) -> bool:
        if key in self._said or len(self._said) >= _MOST_SAID:
            return False
        self._said.add(key)
        return True


def number(value: Any) -> float:
    """Return a finite number of any framework as a float.

    Raises:
        ValueError: saying what it is instead.
    """
    try:
        plain = _plain(value)
        found = float(plain)
    except Exception:
        raise ValueError(f"is {_shown(value)}, a number is expected") from None
    if not math.isfinite(found):
        raise ValueError(f"is {found}, a finite number is expected")
    return found


def count(value: Any) -> int:
    """Return a whole number of any framework as an int.

    Raises:
        ValueError: saying what it is instead.
    """
    try:
        plain = _plain(value)
        if isinstance(plain, float) and plain.is_integer():
            return int(plain)
        return operator.index(plain)
    except Exception:
        raise ValueError(f"is {_shown(value)}, a whole number is expected") from None


def arrays(given: Any, whose: str, what: str = "the weights") -> dict[str, Array]:
    """Return the tensors that a task gives as NumPy arrays.

    Raises:
        TaskError: naming the first that is none.
    """
    if not isinstance(given, Mapping):
        raise TaskError(
            f"{whose} returned {what} {_shown(given)}; a mapping of names to arrays is expected"
        )
    made = {}
    for name, value in given.items():
        try:
            made[name] = np.asarray(value)
        except Exception as why:
            raise TaskError(
                f"{whose} returned tensor '{name}' as a {type(value).__name__}, which makes no "
                f"NumPy array: {one_line(why)}"
            ) from None
    return made


def lent(weights: Weights, task: Task) -> dict[str, Array]:
    """Return the tensors that a task is given: its own to change, unless it says ``only_reads``.

    A read-only flag would not do: ``torch.from_numpy`` and C code write through it, and a task
    that changes what it was given would then be compared with itself.
    """
    if getattr(task, "only_reads", False):
        return as_dict(weights)
    if isinstance(weights, Tensors) and weights.memory:  # all of them in one go
        memory = np.frombuffer(weights.memory, np.uint8).copy().data
        return as_dict(weights.layout.over(memory))
    return copied(weights)


def copied(weights: Weights) -> dict[str, Array]:
    """Return tensors that nobody else holds."""
    return {name: np.array(tensor) for name, tensor in weights.items()}


def _plain(value: Any) -> Any:
    """Return the one element of an array or tensor, and anything else as it is, but text."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, str | bytes | bytearray):
        raise TypeError
    return plain


def _whole(value: Any) -> int:
    try:
        return max(0, count(value))
    except ValueError:
        return 0


def _metric_name(given: Any) -> str:
    """Return the name under which a metric travels; one that is too long is told by its hash."""
    name = sendable(str(given))
    if len(name) <= MAX_METRIC_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_METRIC_NAME - 9]}~{digest}"


def _shown(value: Any) -> str:
    try:
        return sendable(" ".join(reprlib.repr(value).split()), 80)
    except Exception:
        return f"a {type(value).__name__}"
