"""The tasks of simulated clients: parts of one divided task, or a task for each client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from fluffle.federation import numbered
from fluffle.simulation.partition import By, Partition, Parts
from fluffle_common.errors import UsageError
from fluffle_common.tensors.weights import Array
from fluffle_worker.task import Task, TaskOptions


@runtime_checkable
class Divisible(Protocol):
    """A task that can make tasks for parts of its data, such as ``FlaxTask``."""

    @property
    def labels(self) -> Array:
        """The label of each training example, shape [examples]."""

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
        UsageError: if there is no such column, or there are too few examples.
    """
    parts = parts_of(whole, partition, clients, seed)
    names = numbered("client", clients)
    return {
        name: whole.part(rows, number)
        for number, (name, rows) in enumerate(zip(names, parts, strict=True))
    }


def parts_of(whole: Divisible, partition: Partition, clients: int, seed: int = 0) -> Parts:
    """Return the rows of each client; see ``dealt`` for arguments and errors."""
    labels = np.asarray(whole.labels)
    if isinstance(partition, By):
        columns = getattr(whole, "columns", {})
        if partition.column != "label" and partition.column not in columns:
            there = ", ".join(["label", *columns])
            raise UsageError(f"the data have no column '{partition.column}'; choose from {there}")
        labels = np.asarray(columns.get(partition.column, labels))
    return partition.deal(labels, clients, seed)


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
            f"--data '{data}' has an unknown placeholder; only {{client}} and {{clients}} are "
            "replaced"
        ) from None
    return {
        name: make(TaskOptions(data=one, worker=name, seed=seed))
        for name, one in zip(numbered("client", clients), given, strict=True)
    }
