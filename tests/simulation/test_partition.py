"""Dealing examples out: everything once, nobody without any, and as skewed as was asked for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fluffle
from fluffle.simulation.partition import (
    By,
    Dirichlet,
    Iid,
    Shards,
    counts,
    labels_of,
    parse_partition,
    parts_of,
)
from fluffle_common.errors import TaskError, UsageError

PARTITIONS = [Iid(), Dirichlet(0.1), Dirichlet(100.0), Shards(2)]


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@given(
    labels=st.lists(st.integers(0, 5), min_size=40, max_size=200),
    clients=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_each_example_goes_to_one_client_and_nobody_goes_without(partition, labels, clients, seed):
    parts = partition.deal(np.array(labels), clients, seed)
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    again = partition.deal(np.array(labels), clients, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_iid_parts_are_of_one_size_and_alike():
    labels = np.repeat(np.arange(10), 600)
    held = counts(labels, Iid().deal(labels, 10, seed=3))
    assert held.sum(axis=1).tolist() == [600] * 10
    assert np.all((held > 35) & (held < 90)), "60 of each are expected"


def test_two_shards_a_client_are_two_labels_at_most():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    held = counts(labels, Shards(2).deal(labels, 100, seed=1))
    assert held.sum(axis=1).tolist() == [6] * 100
    assert (held > 0).sum(axis=1).max() == 2


def test_a_smaller_alpha_gives_clients_fewer_labels():
    labels = np.repeat(np.arange(10), 500)

    def largest_share(alpha: float) -> float:
        held = counts(labels, Dirichlet(alpha).deal(labels, 20, seed=5))
        return float(np.mean(held.max(axis=1) / held.sum(axis=1)))

    assert largest_share(0.1) > 0.5
    assert largest_share(100.0) < 0.15


def test_a_large_alpha_gives_clients_equal_sizes_even_of_few_examples_per_label():
    labels = np.repeat(np.arange(200), 5)
    sizes = [len(part) for part in Dirichlet(1e6).deal(labels, 20, seed=5)]
    assert sum(sizes) == 1000
    assert np.std(sizes) < 8, "of 200 labels, each gives a client one of five examples or none"


def test_by_a_column_each_value_is_a_client():
    writers = np.array(["x", "y", "x", "z"])
    assert [part.tolist() for part in By("writer").deal(writers, 3, 0)] == [[0, 2], [1], [3]]
    with pytest.raises(UsageError, match=r"column 'writer' has 3 different values.*--clients 3"):
        By("writer").deal(writers, 4, 0)


def test_a_column_is_one_of_the_task():
    whole = SimpleNamespace(labels=np.zeros(3), columns={"writer": ["x", "y", "x"]})
    assert [part.tolist() for part in parts_of(whole, By("writer"), 2)] == [[0, 2], [1]]
    expected = r"no column 'age'; choose from label, writer, or add the column to the task's"
    with pytest.raises(UsageError, match=expected):
        parts_of(whole, By("age"), 2)
    whole.columns["age"] = [1, 2]
    with pytest.raises(UsageError, match="'age' has 2 values for 3 training examples"):
        parts_of(whole, By("age"), 2)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_labels_of_several_types_are_divided(partition):
    labels = np.array([None, "a", 1] * 4, object)
    parts = parts_of(SimpleNamespace(labels=labels), partition, 4)
    assert sorted(np.concatenate(parts).tolist()) == [*range(12)]


def test_a_partition_that_cannot_be_used_is_named():
    class Odd:
        def __init__(self, *parts):
            self.parts = parts

        def deal(self, labels, clients, seed):
            return [np.array(part) for part in self.parts]

    whole = SimpleNamespace(labels=np.zeros(3))
    with pytest.raises(UsageError, match="made 1 part for 2 clients"):
        parts_of(whole, Odd([0, 1, 2]), 2)
    failure = "examples cannot be divided among the clients: ValueError: .* inhomogeneous"
    with pytest.raises(TaskError, match=failure):
        parts_of(SimpleNamespace(labels=[[1], [1, 2]]), Iid(), 2)


@pytest.mark.parametrize(("partition", "clients"), [(Dirichlet(0.5), 2), (By("writer"), 3)])
def test_examples_whose_label_is_missing_are_dealt_too(partition, clients):
    parts = partition.deal(np.array([np.nan, 1.0, 2.0, np.nan, 1.0, 1.0]), clients, 0)
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == [0, 1, 2, 3, 4, 5]


def test_targets_that_are_no_labels_have_no_dirichlet_shares():
    targets = np.random.default_rng(0).normal(size=100)
    expected = (
        "100 examples have 100 different labels; use shards:N, which sorts them, or by:COLUMN"
    )
    with pytest.raises(UsageError, match=expected):
        Dirichlet(0.5).deal(targets, 5, 0)
    assert len(Shards(2).deal(targets, 5, 0)) == len(Iid().deal(targets, 5, 0)) == 5


def test_too_few_examples_are_refused():
    with pytest.raises(UsageError, match="9 examples are too few for 5 clients with 2 shards each"):
        Shards(2).deal(np.zeros(9), 5, 0)


@pytest.mark.parametrize(
    ("text", "partition"),
    [("iid", Iid()), ("dirichlet:0.5", Dirichlet(0.5)), ("shards:2", Shards(2)), ("by:w", By("w"))],
)
def test_a_partition_is_named_by_a_text(text, partition):
    assert parse_partition(text) == partition


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dirichlet", "needs a number above 0"),
        ("dirichlet:nan", "needs a number above 0"),
        ("dirichlet:0", "needs a number above 0"),
        ("shards:1.5", "needs a whole number"),
        ("dirchlet:1", "choose from iid, dirichlet:ALPHA"),
        ("by:", "unknown partition 'by:'"),
        ("iid:3", "unknown partition 'iid:3'"),
    ],
)
def test_what_names_none_is_told_why(text, told):
    with pytest.raises(UsageError, match=told):
        parse_partition(text)


def test_a_plot_stacks_what_each_client_holds():
    class Task:
        labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])

    figure = fluffle.plot_partition(Task(), clients=2, partition="by:label")
    (axes,) = figure.axes
    assert [bands.get_label() for bands in axes.collections] == ["0", "1"]
    tops = [bands.get_paths()[0].vertices[:, 1].max() for bands in axes.collections]
    assert tops == [3, 5]
    assert figure._repr_png_().startswith(b"\x89PNG")  # in a notebook
    with pytest.raises(UsageError, match="8 examples are too few for 9 clients"):
        fluffle.plot_partition(Task(), clients=9)


@pytest.mark.parametrize("partition", [*PARTITIONS, By("label")], ids=str)
def test_rows_of_labels_are_divided_as_their_classes_are(partition):
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 10))
    of_classes = parts_of(SimpleNamespace(labels=classes), partition, 4, seed=2)
    for rows in (np.eye(4)[classes], classes[:, None], np.eye(4)[classes].reshape(40, 2, 2)):
        whole = SimpleNamespace(labels=rows)
        np.testing.assert_array_equal(labels_of(whole), classes)
        for one, other in zip(parts_of(whole, partition, 4, seed=2), of_classes, strict=True):
            np.testing.assert_array_equal(one, other)
