"""What a worker trains: the ``Task`` protocol.

A task owns the data and the model of one data owner. It gets the global weights and a plan, and
returns what it learnt; it knows nothing of rounds, brokers or other workers. Any class with these
three methods is one: plain NumPy, PyTorch, or a Flax model by way of ``flax_task``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.messages import MAX_CLASS_NAME, MAX_NUM_EXAMPLES, Plan
from fluffle_common.tensors.weights import Weights
from fluffle_worker.user_code import sendable

Progress = Callable[[int, int, float | None], None]
"""``progress(step, steps, loss)``: call it once a step; it raises when the work is not wanted."""

DEFAULT_TASK = "fluffle_worker.letters.task:task"


@dataclass(frozen=True)
class TrainResult:
    """What training returned.

    Args:
        weights: the trained weights; names, shapes and dtypes as received.
        num_examples: on how many examples they were trained; the weight in the average.
        metrics: anything worth knowing; ``loss`` is the mean training loss, and ``steps`` the
            number of local steps (the strategies qfedavg and fednova need them).
        extra: tensors for a strategy that asks for some (``Needs.extra``); not sent to another.
    """

    weights: Weights
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """How weights do on held-out data: the mean loss over ``num_examples``, and other metrics."""

    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class RoundPlan(Plan):
    """The plan of one round, as a task gets it: its ``seed`` is the round's own.

    Args:
        run: the id of the run.
        round: the number of the round, from 1.
        sequence: the number of this worker's ticket: the round, unless the federation is
            asynchronous; then one more with each piece of work.
    """

    run: str = ""
    round: int = 0
    sequence: int = 0


class Task(Protocol):
    """One data owner's model and data.

    The arrays that ``train`` and ``evaluate`` get are the task's own to change. These attributes
    are optional:

    - ``only_reads = True``: it never writes to them, and so gets views instead of copies;
    - ``local_rule``: a ``local.bound.BoundRule`` that ``train`` applies to its gradients;
      ``--local-rule`` puts another in its place;
    - ``keep_in(folder)``: where it may keep what has to outlive a restart of the worker;
    - ``frozen()``: the tensors of its model that neither train nor travel with it, by name; workers
      that have different ones are reported;
    - ``share_frozen = True``: it has them from the federation: the first worker's, or those of
      ``--init``, which are sent once to each worker that lacks them;
    - ``use_frozen(tensors)``: puts them in the place of its own, in the thread of ``train``;
    - ``model_form()``: the names of its tensors, with anything that has their ``dtype`` and
      ``shape``, such as ``jax.eval_shape`` returns. Otherwise ``init(0)`` is called for that when
      the worker starts.
    """

    num_examples: int
    """How many examples there are to train on."""

    def init(self, seed: int) -> Weights:
        """Make first weights; the same for the same seed, whichever worker is asked."""

    def train(self, weights: Weights, plan: RoundPlan, progress: Progress) -> TrainResult:
        """Train these weights on the local data; called in a thread of its own."""

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Evaluate these weights on local held-out data; None where there is none."""


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says to a task.

    Args:
        data: the value of ``--data``, whatever the task makes of it.
        worker: the worker's id.
        seed: the seed of ``--seed``, such as for a split of the data.
        classes: the classes of ``--classes``; None lets the task read them off its data.
    """

    data: str
    worker: str
    seed: int = 0
    classes: tuple[str, ...] | None = None


TaskFactory = Callable[[TaskOptions], Task]


def classes_of(task: Task) -> tuple[str, ...]:
    """Return the classes of a task that has some, in the order of its model's outputs."""
    given = getattr(task, "classes", None)
    return () if given is None else tuple(sendable(str(name)) for name in given)


def num_examples_of(task: Task) -> int:
    """Return how many examples a task trains on, as an int whatever integer it is."""
    return operator.index(task.num_examples)


def check_task(name: str, task: Any) -> Task:
    """Check what a task is by its methods and attributes; return it.

    Raises:
        UsageError: where it is none.
        TaskError: where it says something of itself that cannot be.
    """
    for method in ("init", "train", "evaluate"):
        if not callable(getattr(task, method, None)):
            raise UsageError(
                f"the object that {name} returns is not a task: it has no method '{method}'"
            )
    try:
        num_examples = operator.index(getattr(task, "num_examples", None))  # type: ignore[arg-type]
    except TypeError:
        raise TaskError(
            f"the task {name} has num_examples {getattr(task, 'num_examples', None)!r:.60}; a "
            "whole number is expected"
        ) from None
    if num_examples < 1:
        raise TaskError(f"the task {name} has no examples to train on; check --data")
    if num_examples > MAX_NUM_EXAMPLES:
        raise TaskError(
            f"the task {name} has {num_examples} examples; at most {MAX_NUM_EXAMPLES} are expected"
        )
    for called in classes_of(task):
        if len(called) > MAX_CLASS_NAME:
            raise TaskError(
                f"the class '{called[:40]}…' of the task {name} has a name of {len(called)} "
                f"characters, at most {MAX_CLASS_NAME} travel; give it a shorter one"
            )
    return task  # type: ignore[no-any-return]
