"""Partitions: rules that split the examples of one data set among clients.

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
from typing import Any, Protocol

import numpy as np

from fluffle_common.errors import UsageError
from fluffle_common.tensors.weights import Array

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
    draw leaves without examples gets one from the client with the most.
    """

    alpha: float

    def deal(self, labels: Array, clients: int, seed: int) -> Parts:
        """See ``Partition``."""
        _check_enough(len(labels), clients)
        rng = np.random.default_rng(seed)
        held: list[list[int]] = [[] for _ in range(clients)]
        for rows in _by_value(labels):
            of_label = rng.permutation(rows)
            shares = rng.dirichlet(np.full(clients, self.alpha))
            ends = np.round(np.cumsum(shares) * len(of_label)).astype(int)[:-1]
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
    values, numbers = np.unique(labels, return_inverse=True)
    return [np.flatnonzero(numbers == number) for number in range(len(values))]


def _without_empty(held: list[list[int]]) -> Parts:
    for client in held:
        if not client:
            client.append(max(held, key=len).pop())
    return [np.sort(np.array(client, np.int64)) for client in held]
