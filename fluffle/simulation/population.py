"""The tasks of simulated clients: parts of one divided task, or a task for each client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from fluffle.federation import make_task, numbered
from fluffle.simulation.partition import By, Partition, Parts, check_whole
from fluffle_common.cli.user_code import call_task
from fluffle_common.errors import UsageError
from fluffle_common.plural import plural
from fluffle_common.tensors.weights import Array
from fluffle_worker.task import Task, TaskOptions


@runtime_checkable
class Divisible(Protocol):
    """A task that can make tasks for parts of its data, such as ``FlaxTask``.

    It also needs the attribute ``labels``: the label of each training example, or a row of labels;
    an array of shape [examples, …].
    """

    def part(self, rows: Array, sample_seed: int) -> Task:
        """Return a task with only some of the training examples.

        Args:
            rows: the indices of the examples, int64.
            sample_seed: the seed of this part's batches.
        """


def dealt(whole: Divisible, partition: Partition, clients: int, seed: int = 0) -> dict[str, Task]:
    """Divide a task among clients; return their tasks by client name.

    The partition ``by:COLUMN`` needs ``whole.columns[COLUMN]``.

    Raises:
        UsageError: if there is no such column, there are too few examples, or a number is invalid.
        TaskError: if the task's labels or columns cannot be divided, or a part is not a task.
    """
    parts = parts_of(whole, partition, clients, seed)
    names = numbered("client", clients)
    return {
        name: make_task(name, call_task(f"part() fails for '{name}'", whole.part, rows, number))
        for number, (name, rows) in enumerate(zip(names, parts, strict=True))
    }


def parts_of(whole: Divisible, partition: Partition, clients: int, seed: int = 0) -> Parts:
    """Return the rows of each client; raises what ``dealt`` does."""
    check_whole("clients", clients, 1)
    check_whole("seed", seed, 0)
    failure = "the examples cannot be divided among the clients"
    return call_task(failure, _rows, whole, partition, clients, seed)  # type: ignore[no-any-return]


def _rows(whole: Divisible, partition: Partition, clients: int, seed: int) -> Parts:
    labels = labels_of(whole)
    if isinstance(partition, By):
        columns = getattr(whole, "columns", {})
        if partition.column != "label" and partition.column not in columns:
            there = ", ".join(["label", *columns])
            raise UsageError(
                f"the task has no column '{partition.column}'; choose from {there}, or add the "
                "column to the task's attribute 'columns'"
            )
        column = _single(np.asarray(columns.get(partition.column, labels)))
        if len(column) != len(labels):
            raise UsageError(
                f"the task's column '{partition.column}' has {plural(len(column), 'value')} for "
                f"{plural(len(labels), 'training example')}; give one value for each example"
            )
        labels = column
    parts = partition.deal(labels, clients, seed)
    if len(parts) != clients:
        raise UsageError(
            f"the partition {partition!r:.60} made {plural(len(parts), 'part')} for "
            f"{plural(clients, 'client')}; make one part for each client"
        )
    return parts


def labels_of(whole: object) -> Array:
    """Return one label for each training example: equal rows of labels become equal numbers.

    Raises:
        UsageError: if it is not such a task.
    """
    if not hasattr(whole, "labels"):
        raise UsageError(
            f"a {type(whole).__name__} cannot be divided among clients, because it has no labels"
        )
    return _single(np.asarray(whole.labels))


def _single(labels: Array) -> Array:
    if labels.dtype == object:  # such as None among text, which could not be sorted
        labels = labels.astype(str)
    if labels.ndim < 2:
        return labels
    rows = labels.reshape(len(labels), -1)
    if rows.shape[1] == 1:
        return rows[:, 0]
    # In descending order of the rows, the number of a one-hot row is its class.
    distinct, numbers = np.unique(rows, axis=0, return_inverse=True)
    return np.subtract(len(distinct) - 1, numbers.reshape(-1))


def each_its_own(
    make: Callable[[TaskOptions], Task], data: str, clients: int, seed: int = 0
) -> dict[str, Task]:
    """Make a separate task for each client.

    In ``data``, the ``--data`` of each task, ``{client}`` is replaced by the client's number, from
    0, and ``{clients}`` by the number of clients.

    Raises:
        UsageError: if ``data`` has other braces.
    """
    try:
        given = [data.format(client=number, clients=clients) for number in range(clients)]
    except (KeyError, IndexError, ValueError):
        raise UsageError(
            f"--data '{data}' has an unknown placeholder; use only {{client}} and {{clients}}"
        ) from None
    return {
        name: make(TaskOptions(data=one, worker=name, seed=seed))
        for name, one in zip(numbered("client", clients), given, strict=True)
    }
