"""Loading of the task that ``--task`` names, and the check of any task."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numpy as np

from fluffle_common.cli.loading import Place
from fluffle_common.cli.user_code import task_error
from fluffle_common.cli.user_values import count, shown
from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.task import Task, TaskOptions, classes_of

_REQUIRED = ("init", "train", "evaluate")
_METHODS = ("frozen", "keep_in", "model_form", "use_frozen")
# The optional attributes: how each is checked, and what it should be.
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_METHODS, (callable, "a method")),
    **dict.fromkeys(
        ("only_reads", "share_frozen"),
        (lambda given: isinstance(given, bool | np.bool_), "True or False"),
    ),
    "statistics": (
        lambda given: (
            isinstance(given, tuple | list | Set) and all(isinstance(name, str) for name in given)
        ),
        "a list of names of tensors",
    ),
    "local_rule": (lambda given: isinstance(given, BoundRule), "a BoundRule (docs/tasks.md)"),
}


def load_factory(name: str) -> Callable[[TaskOptions], Task]:
    """Return the factory at ``module:name`` or ``path.py:name``, which makes checked tasks.

    Raises:
        UsageError: if there is no such factory; when called, if what it returns is not a task, or
            the task ignores ``options.classes``.
        TaskError: when called, if it fails, for example because data is missing.
    """
    place = Place.parse("task", name)
    factory = place.load()
    if not callable(factory):
        raise UsageError(
            f"{place.where} has no function '{place.attribute}' that makes a task; correct --task"
        )

    def make(options: TaskOptions) -> Task:
        try:
            task = check_task(name, factory(options))
        except (TaskError, UsageError):
            raise
        except ModuleNotFoundError as why:
            raise place.missing(why) from None
        except BaseException as why:
            raise task_error(why, f"the task {name} cannot start", "task") from why
        own, named = classes_of(task), options.classes or ()
        if own and named and len(own) != len(named):  # it may spell them otherwise
            raise UsageError(
                f"--classes names {', '.join(named)}, but the task {name} has the classes "
                f"{', '.join(own)}; let the task use options.classes"
            )
        return task

    return make


def check_task(name: str, task: Any) -> Task:
    """Check an object's methods and attributes, and return it as a task.

    Raises:
        UsageError: if it lacks a method.
        TaskError: if an attribute has an invalid value.
    """
    for method in _REQUIRED:
        if not callable(getattr(task, method, None)):
            raise UsageError(
                f"the task {name} is {shown(task)}, which has no method '{method}'; expected an "
                "object with the methods init, train and evaluate"
            )
    for attribute, (fits, expected) in _OPTIONAL.items():
        given = getattr(task, attribute, None)
        if given is not None and not fits(given):
            raise TaskError(f"the task {name} has {attribute} {shown(given)}; expected {expected}")
    try:
        num_examples = count(getattr(task, "num_examples", None))
    except ValueError as wrong:
        raise TaskError(f"the task {name} has num_examples {wrong}") from None
    if num_examples < 1:
        raise TaskError(f"the task {name} has no examples to train on; check --data")
    try:
        classes = classes_of(task)
    except TypeError:
        raise TaskError(
            f"the task {name} has classes {shown(task.classes)}; expected a sequence of class names"
        ) from None
    if "" in classes or len(set(classes)) < len(classes):
        raise TaskError(f"the task {name} has classes {shown(classes)}; expected different names")
    return task  # type: ignore[no-any-return]
