"""Who takes part in a simulation: clients whose data are parts of one data set, or their own."""

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
    """A task on a whole data set that makes tasks on parts of it; ``FlaxTask`` is one."""

    @property
    def labels(self) -> Array:
        """Return the label of each training example, shape [examples]."""

    def part(self, rows: Array, sample_seed: int) -> Task:
        """Return a task that trains on these training examples only.

        Args:
            rows: their indices, int64.
            sample_seed: makes the batches of this part its own.
        """


def names(clients: int) -> list[str]:
    """Return a name for each client."""
    return numbered("client", clients)


def dealt(whole: Divisible, partition: Partition, clients: int, seed: int = 0) -> dict[str, Task]:
    """Deal the training examples of a task out to clients.

    Args:
        whole: the task with all examples.
        partition: by which rule; ``by:COLUMN`` needs ``whole.columns[COLUMN]``.
        clients: to how many.
        seed: of what the rule draws.

    Raises:
        UsageError: where there is no such column, or there are too few examples.
    """
    parts = parts_of(whole, partition, clients, seed)
    return {
        name: whole.part(rows, number)
        for number, (name, rows) in enumerate(zip(names(clients), parts, strict=True))
    }


def parts_of(whole: Divisible, partition: Partition, clients: int, seed: int = 0) -> Parts:
    """Return the rows of each client; arguments and errors as of ``dealt``."""
    labels = np.asarray(whole.labels)
    if isinstance(partition, By):
        columns = getattr(whole, "columns", {})
        if partition.column != "label" and partition.column not in columns:
            there = ", ".join(["label", *columns])
            raise UsageError(f"the data have no column '{partition.column}'; there is {there}")
        labels = np.asarray(columns.get(partition.column, labels))
    return partition.deal(labels, clients, seed)


def each_its_own(
    make: Callable[[TaskOptions], Task], data: str, clients: int, seed: int = 0
) -> dict[str, Task]:
    """Make a task for each client.

    Args:
        make: as ``--task`` names it.
        data: ``--data`` of each; ``{client}`` in it is the client's number, from 0 on, and
            ``{clients}`` how many there are.
        clients: how many.
        seed: ``--seed`` of each.

    Raises:
        UsageError: where ``data`` has other braces.
    """
    try:
        given = [data.format(client=number, clients=clients) for number in range(clients)]
    except (KeyError, IndexError, ValueError):
        raise UsageError(
            f"--data '{data}': in braces, only {{client}} and {{clients}} are known"
        ) from None
    return {
        name: make(TaskOptions(data=one, worker=name, seed=seed))
        for name, one in zip(names(clients), given, strict=True)
    }
