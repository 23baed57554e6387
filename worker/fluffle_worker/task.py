"""What a worker trains: the ``Task`` protocol, and how one is found.

A task owns the data and the model of one data owner. It gets the global weights and a plan, and
returns what it learnt; it knows nothing of rounds, brokers or other workers. Any class with these
three methods is one: plain NumPy, PyTorch, or a Flax model by way of ``flax_task``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.messages import Plan
from fluffle_common.weights import Weights

Progress = Callable[[int, int, float | None], None]
"""``progress(step, steps, loss)``: call it once a step; it raises when the work is not wanted."""

DEFAULT_TASK = "fluffle_worker.letters.task:task"


@dataclass(frozen=True)
class TrainResult:
    """What training returned.

    Args:
        weights: the trained weights; names, shapes and dtypes as received.
        num_examples: on how many examples they were trained; the weight in the average.
        metrics: anything worth knowing; ``loss`` is the mean training loss.
    """

    weights: Weights
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """How weights do on held-out data: the mean loss over ``num_examples``, and other metrics."""

    loss: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """One data owner's model and data."""

    num_examples: int
    """How many examples there are to train on."""

    def init(self, seed: int) -> Weights:
        """Make first weights; the same for the same seed, whichever worker is asked."""

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
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
    return tuple(getattr(task, "classes", ()))


def load_task(name: str, options: TaskOptions) -> Task:
    """Make the task that ``module:name`` or ``path.py:name`` names.

    Raises:
        UsageError: where there is no such thing.
        TaskError: where it fails to make a task of these options, such as for want of data.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise UsageError(f"--task wants module:name or path.py:name, not '{name}'")
    module = _module(where)
    factory: TaskFactory | None = getattr(module, attribute, None)
    if not callable(factory):
        raise UsageError(f"{where} has no function '{attribute}' that makes a task (--task)")
    try:
        task = factory(options)
    except (TaskError, UsageError):
        raise
    except Exception as why:
        raise TaskError(f"the task {name} cannot start: {told(why)}") from why
    for method in ("init", "train", "evaluate"):
        if not callable(getattr(task, method, None)):
            raise UsageError(f"what {name} makes is no task: it has no method '{method}'")
    if not isinstance(getattr(task, "num_examples", None), int) or task.num_examples < 1:
        raise TaskError(f"the task {name} has no examples to train on; look at --data")
    return task


def told(why: BaseException) -> str:
    """Say an error of somebody else's code in one line."""
    text = " ".join(str(why).split())
    return f"{type(why).__name__}: {text}"[:500] if text else type(why).__name__


def _module(where: str) -> object:
    try:
        if not where.endswith(".py"):
            sys.path.insert(0, "")  # a module beside the user, as `python -m` finds it
            try:
                return importlib.import_module(where)
            finally:
                sys.path.remove("")
        path = Path(where)
        if not path.is_file():
            raise UsageError(f"there is no file {where} (--task)")
        spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except ModuleNotFoundError as why:
        if why.name and (where == why.name or where.startswith(f"{why.name}.")):
            raise UsageError(f"there is no module {where} (--task)") from None
        raise UsageError(
            f"the task {where} needs the package '{why.name}', which is not installed; "
            "pip install 'fluffle[worker]' brings JAX and Flax"
        ) from None
    except UsageError:
        raise
    except Exception as why:
        raise TaskError(f"the task's file {where} fails to load: {told(why)}") from why
    return module
