"""Which examples are in which batch, for data that lies in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Array


def batch_size_of(plan: Plan, count: int) -> int:
    """Return the size of all batches of ``count`` examples."""
    return min(plan.batch_size, count)


def steps_of(plan: Plan, count: int) -> int:
    """Return how many steps a training on ``count`` examples takes."""
    return plan.steps or plan.epochs * -(-count // batch_size_of(plan, count))


def index_batches(plan: Plan, count: int, sample_seed: int) -> Iterator[Array]:
    """Yield index arrays of one size: a fresh order each epoch, its last batch filled up.

    A last batch of another size would be compiled a second time by JAX; filling it up from the
    start of the epoch's order shows a few examples twice.

    Args:
        plan: how many, and the seed of the round.
        count: how many examples there are.
        sample_seed: makes the order this worker's own.
    """
    size, left = batch_size_of(plan, count), steps_of(plan, count)
    rng = np.random.default_rng([plan.seed, sample_seed])
    while left:
        order = rng.permutation(count).astype(np.int32)
        filled = np.resize(order, -(-count // size) * size)
        batches = np.split(filled, len(filled) // size)[:left]
        left -= len(batches)
        yield from batches
