"""Loading of the task that ``--task`` names."""

from __future__ import annotations

from collections.abc import Callable

from fluffle_common.cli.loading import Place
from fluffle_common.cli.user_code import task_error
from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.task import Task, TaskOptions, check_task, classes_of


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
