"""The ``Task`` protocol: what a worker trains and evaluates.

A task owns one data owner's data and model code. It receives the global weights and a plan, and
returns trained weights; it knows nothing about brokers or other workers. Any object with the three
methods is a task, whatever its framework; ``flax_task``, ``torch_task`` and ``sklearn_task`` are
adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fluffle_common.cli.user_values import count
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights
from fluffle_common.user_errors import sendable

Progress = Callable[[int, int, float | None], None]
"""``progress(step, steps, loss)``: called after each step; it raises once the work is obsolete."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a local training.

    Args:
        weights: the trained weights, with the names, shapes and dtypes of the received ones.
        num_examples: the number of training examples, which weighs the update in the average.
        metrics: numbers by name. ``loss`` is the mean training loss (used by the strategy qfedavg),
            ``steps`` the number of local steps (used by fednova).
        extra: extra tensors; sent only if the strategy asks for them (``Needs.extra``).
    """

    weights: Weights
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """The mean loss and other metrics of a model over ``num_examples`` held-out examples."""

    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class FailedMetric(float):
    """NaN, in place of a metric whose function failed; ``why`` is its error."""

    why: BaseException

    def __new__(cls, why: BaseException) -> FailedMetric:
        """Return NaN with this error."""
        made = super().__new__(cls, "nan")
        made.why = why
        return made


def measured(metric: Callable[..., Any], *args: Any) -> float:
    """Return a metric; its error costs only this metric."""
    try:
        return float(metric(*args))
    except Exception as why:
        return FailedMetric(why)


class RoundPlan(Plan):
    """The plan of one training, as a task receives it; its ``seed`` differs in each round.

    Args:
        run: the id of the run.
        round: the number of the round, from 1.
        sequence: the number of this worker's ticket. In synchronous rounds it is the round; in
            asynchronous runs it grows with each piece of work.
    """

    run: str = ""
    round: int = 0
    sequence: int = 0


def work_of(plan: Plan) -> tuple[str, int, int]:
    """Return the run, the round and the sequence of a plan; ``("", 0, 0)`` outside of a run."""
    return (plan.run, plan.round, plan.sequence) if isinstance(plan, RoundPlan) else ("", 0, 0)


class Task(Protocol):
    """One data owner's model and data.

    The methods run in the training thread, one at a time. The arrays that ``train`` and
    ``evaluate`` receive are the task's to modify.

    Optional attributes:

    - ``only_reads = True``: the task never writes to those arrays, and receives views, not copies;
    - ``classes``: the names of the classes, in the order of the model's outputs;
    - ``statistics``: the names of the tensors that are no parameters, such as running means: they
      are averaged, but no server step changes them;
    - ``local_rule``: a ``local.bound.BoundRule`` that ``train`` applies to its gradients;
      ``--local-rule`` replaces it;
    - ``keep_in(folder)``: receives the folder for state that must outlive a restart of the worker;
    - ``frozen()``: returns the tensors of the model that are never trained, by name; workers with
      different ones are reported;
    - ``share_frozen = True``: the federation's frozen tensors replace the task's own: those of the
      first worker or of ``--init``, which each worker that lacks them is sent once;
    - ``use_frozen(tensors)``: replaces the frozen tensors; called in the thread of ``train``;
    - ``model_form()``: returns, by name, anything with each tensor's ``dtype`` and ``shape``, such
      as the result of ``jax.eval_shape``; without it, the worker calls ``init(0)`` at its start.
    """

    num_examples: int
    """The number of training examples."""

    def init(self, seed: int) -> Weights:
        """Return initial weights; equal seeds give equal weights on every worker."""

    def train(self, weights: Weights, plan: RoundPlan, progress: Progress) -> TrainResult:
        """Train from ``weights`` on the local data."""

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Evaluate ``weights`` on the local held-out data; return None if there is none."""


@dataclass(frozen=True)
class TaskOptions:
    """The command-line options that a task factory receives.

    Args:
        data: the value of ``--data``; the task decides what it means.
        worker: the worker's id.
        seed: the value of ``--seed``, for example to split the data.
        classes: the value of ``--classes``; None if the task should take them from its data.
    """

    data: str
    worker: str
    seed: int = 0
    classes: tuple[str, ...] | None = None


def classes_of(task: Task) -> tuple[str, ...]:
    """Return the names of a task's classes, in the order of its model's outputs; else ().

    Raises:
        TypeError: if they are text, cannot be iterated over, or only once, or in no fixed order.
    """
    given = getattr(task, "classes", None)
    if isinstance(given, str | bytes | Iterator | set | frozenset):
        raise TypeError
    return () if given is None else tuple(sendable(str(name)) for name in given)


def statistics_of(task: Task) -> tuple[str, ...]:
    """Return the names of the tensors of a task's model that are no parameters, sorted."""
    return tuple(sorted(set(getattr(task, "statistics", None) or ())))


def num_examples_of(task: Task) -> int:
    """Return a task's number of training examples as a plain int.

    Raises:
        ValueError: if it is no whole number.
    """
    return count(task.num_examples)
