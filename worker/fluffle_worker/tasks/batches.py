"""Shuffled index batches of equal size, for training data in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Array


def batch_size_of(plan: Plan, count: int) -> int:
    """Return the batch size for ``count`` examples."""
    return min(plan.batch_size, count)


def steps_of(plan: Plan, count: int) -> int:
    """Return the number of training steps on ``count`` examples."""
    return plan.steps or plan.epochs * -(-count // batch_size_of(plan, count))


def index_batches(plan: Plan, count: int, sample_seed: int) -> Iterator[Array]:
    """Yield one int32 index array of shape [batch size] per step, shuffled in each epoch.

    The last batch of an epoch is filled with examples from the start of that epoch's order, which
    are then used twice. JAX would compile the step a second time for a smaller batch.

    Args:
        plan: the number of epochs or steps, the batch size and the seed of the round.
        count: the number of examples.
        sample_seed: decorrelates this worker's order from those of other workers.
    """
    size, left = batch_size_of(plan, count), steps_of(plan, count)
    rng = np.random.default_rng([plan.seed, sample_seed])
    while left:
        order = rng.permutation(count).astype(np.int32)
        filled = np.resize(order, -(-count // size) * size)
        batches = np.split(filled, len(filled) // size)[:left]
        left -= len(batches)
        yield from batches
