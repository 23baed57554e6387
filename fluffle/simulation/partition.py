"""The tasks of simulated clients: parts of one task, divided by a partition, or one for each.

Every partition gives each example to exactly one client and each client at least one example. The
same seed gives the same partition.

Example:
    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> [part.tolist() for part in parse_partition("by:label").deal(labels, clients=2, seed=0)]
    [[0, 1, 2], [3, 4, 5]]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fluffle.federation import make_task, numbered
from fluffle_common.cli.user_code import call_task
from fluffle_common.errors import UsageError
from fluffle_common.plural import plural
from fluffle_common.tensors.weights import Array
from fluffle_worker.task import Task, TaskOptions

Parts = list[Array]
"""For each client, the ascending indices of its examples, int64."""


class Partition(Protocol):
    """A rule that splits examples among clients."""

    def deal(self, labels: Array, clients: int, seed: int) -> Parts:
        """Split the examples with these labels, shape [examples].

        Raises:
            UsageError: if there are too few examples for so many clients.
        """


@dataclass(frozen=True)
class Iid(Partition):
    """Random samples whose sizes differ by at most one."""

    def deal(self, labels: Array, clients: int, seed: int) -> Parts:
        """See ``Partition``."""
        _check_enough(len(labels), clients)
        order = np.random.default_rng(seed).permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, clients)]


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Label shares drawn from a Dirichlet distribution.

    Each label is divided among all clients, as in Yurochkin et al., "Bayesian Nonparametric
    Federated Learning of Neural Networks", ICML 2019. The smaller ``alpha``, the fewer labels a
    client has; with a large one, all clients are alike. Their sizes differ, too. A client that the
    draw leaves without examples gets one from the client with the most. Labels that hardly occur
    twice, such as the targets of a regression, are refused.
    """

    alpha: float

    def deal(self, labels: Array, clients: int, seed: int) -> Parts:
        """See ``Partition``."""
        _check_enough(len(labels), clients)
        rng = np.random.default_rng(seed)
        held: list[list[int]] = [[] for _ in range(clients)]
        of_labels = _by_value(labels)
        if 2 * len(of_labels) > len(labels):  # the parts would be alike, whatever alpha is
            raise UsageError(
                f"the partition dirichlet:{self.alpha:g} divides the examples of each label, but "
                f"{len(labels)} examples have {len(of_labels)} different labels; use shards:N, "
                "which sorts them, or by:COLUMN with a group for each example"
            )
        for rows in of_labels:
            of_label = rng.permutation(rows)
            shares = rng.dirichlet(np.full(clients, self.alpha))
            # Rounded at random: with few examples of a label, the nearest integers would give
            # them to the same clients for each label.
            ends = np.floor(np.cumsum(shares) * len(of_label) + rng.random()).astype(int)[:-1]
            for client, part in zip(held, np.split(of_label, ends), strict=True):
                client.extend(part.tolist())
        return _without_empty(held)


@dataclass(frozen=True)
class Shards(Partition):
    """Equal shards of the examples sorted by label, ``each`` per client.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, section 3, use 2 shards per client, so that most clients have only two labels.
    """

    each: int

    def deal(self, labels: Array, clients: int, seed: int) -> Parts:
        """See ``Partition``."""
        number = clients * self.each
        _check_enough(len(labels), number, f"{clients} clients with {self.each} shards each")
        shards = np.array_split(np.argsort(labels, kind="stable"), number)
        order = np.random.default_rng(seed).permutation(number).reshape(clients, self.each)
        return [np.sort(np.concatenate([shards[one] for one in ours])) for ours in order]


@dataclass(frozen=True)
class By(Partition):
    """One client per value of a column, such as the writer; ``clients`` must be their number."""

    column: str

    def deal(self, labels: Array, clients: int, seed: int) -> Parts:
        """See ``Partition``; ``labels`` are the values of the column."""
        values = _by_value(labels)
        if clients != len(values):
            raise UsageError(
                f"column '{self.column}' has {len(values)} different values, and each value makes "
                f"one client, but {clients} clients were requested; use --clients {len(values)}"
            )
        return values


def parse_partition(text: str | Partition) -> Partition:
    """Return the partition that a text describes; return a partition as it is.

    Args:
        text: ``iid``, ``dirichlet:ALPHA``, ``shards:N`` or ``by:COLUMN``.

    Raises:
        UsageError: if it describes none.
    """
    if not isinstance(text, str):
        if isinstance(text, type) or not hasattr(text, "deal"):
            raise UsageError(
                f"{text!r:.80} is not a partition; use text such as dirichlet:0.5, or an object "
                "with deal()"
            )
        return text
    kind, _, given = text.partition(":")
    if kind == "iid" and not given:
        return Iid()
    if kind == "dirichlet":
        alpha = _number(float, text, given, "a number above 0, such as dirichlet:0.5")
        return Dirichlet(alpha)
    if kind == "shards":
        return Shards(_number(int, text, given, "a whole number above 0, such as shards:2"))
    if kind == "by" and given:
        return By(given)
    raise UsageError(
        f"unknown partition '{text}'; choose from iid, dirichlet:ALPHA, shards:N and by:COLUMN"
    )


def counts(labels: Array, parts: Parts) -> Array:
    """Return the number of examples of each label at each client, shape [clients, labels]."""
    values, numbers = np.unique(labels, return_inverse=True)
    return np.stack([np.bincount(numbers[part], minlength=len(values)) for part in parts])


def check_whole(name: str, number: Any, least: int) -> None:
    """Check a number.

    Raises:
        UsageError: if it is not a whole number of at least ``least``.
    """
    if not isinstance(number, Integral) or int(number) < least:
        raise UsageError(
            f"{name} = {number!r} is not valid; expected a whole number of at least {least}"
        )


def _number(kind: Callable[[str], Any], text: str, given: str, wanted: str) -> Any:
    try:
        number = kind(given)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise UsageError(f"the partition '{text}' needs {wanted}")
    return number


def _check_enough(examples: int, needed: int, by: str | None = None) -> None:
    if examples < needed:
        raise UsageError(
            f"{examples} examples are too few for {by or f'{needed} clients'}; simulate fewer "
            "clients, or give more data"
        )


def _by_value(labels: Array) -> Parts:
    """Return the indices of the examples of each value, in ascending order; NaN is one value."""
    _, numbers = np.unique(labels, return_inverse=True)
    return np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])


def _without_empty(held: list[list[int]]) -> Parts:
    for client in held:
        if not client:
            client.append(max(held, key=len).pop())
    return [np.sort(np.array(client, np.int64)) for client in held]


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
            f"a {type(whole).__name__} cannot be divided among clients, because it has no "
            "attribute 'labels'; add this attribute, with one label for each training example"
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
