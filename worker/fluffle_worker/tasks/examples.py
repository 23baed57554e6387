"""Training data of a Flax task: arrays on the device, or batches that come one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Array
from fluffle_worker.tasks.batches import index_batches, steps_of

Examples = tuple[Any, Any]
"""(inputs, targets): each an array, or a dict, tuple or list of arrays, with one first axis."""
Stream = Callable[[int, np.random.Generator], Iterator[Examples]]
"""``(epoch, rng) -> batches``: called once for each epoch, which counts from 0."""


class InMemory:
    """Arrays that stay on the device: a batch is a gather there, not a copy from here.

    Args:
        data: the examples.
        sample_seed: makes the order of batches this worker's own.

    Raises:
        TaskError: if the arrays differ in how many examples they have.
    """

    def __init__(self, data: Examples, sample_seed: int) -> None:
        self.num_examples = count_of(data, "train_data")
        self.source: Any = jax.device_put(data)
        self._sample_seed = sample_seed
        self._rows: Array | None = None  # those of a part

    def part(self, rows: Array, sample_seed: int) -> InMemory:
        """Return some of the examples, by their indices; their arrays are the same."""
        made = copy.copy(self)
        made.num_examples, made._rows = len(rows), np.asarray(rows, np.int32)
        made._sample_seed = sample_seed
        return made

    def steps(self, plan: Plan) -> int:
        """Return how many steps a training takes."""
        return steps_of(plan, self.num_examples)

    def batches(self, plan: Plan) -> Iterator[Array]:
        """Yield the indices of each batch; see ``index_batches``."""
        batches = index_batches(plan, self.num_examples, self._sample_seed)
        return batches if self._rows is None else (self._rows[batch] for batch in batches)


class Streamed:
    """Batches from a callable, for data larger than memory.

    The sizes of the batches are the stream's own; each size is compiled once.

    Args:
        stream: makes the batches of an epoch.
        num_examples: how many examples there are in an epoch.
        sample_seed: makes the ``rng`` of each epoch this worker's own.

    Raises:
        TaskError: if ``num_examples`` is not given.
    """

    source: Any = None

    def __init__(self, stream: Stream, num_examples: int | None, sample_seed: int) -> None:
        if not num_examples:
            raise TaskError(
                "train_data is a callable, which does not say how many examples it yields; give "
                "num_examples= as well"
            )
        self.num_examples = num_examples
        self._stream, self._sample_seed = stream, sample_seed

    def steps(self, plan: Plan) -> int:
        """Return how many steps a training is expected to take."""
        return plan.steps or plan.epochs * -(-self.num_examples // plan.batch_size)

    def batches(self, plan: Plan) -> Iterator[Examples]:
        """Yield the batches of all epochs, or of so many that there are ``steps``.

        Raises:
            TaskError: if an epoch has none.
        """
        done = epoch = 0
        while done < plan.steps if plan.steps else epoch < plan.epochs:
            rng = np.random.default_rng([plan.seed, self._sample_seed, epoch])
            before = done
            for batch in self._stream(epoch, rng):
                yield batch
                done += 1
                if done == plan.steps:
                    return
            if done == before:
                raise TaskError(f"train_data yields no batch in epoch {epoch}")
            epoch += 1


def count_of(data: Examples, what: str) -> int:
    """Return how many examples there are.

    Raises:
        TaskError: if the arrays differ in that, or there is none.
    """
    counts = {len(array) for array in jax.tree.leaves(data)}
    if len(counts) != 1:
        told = ", ".join(map(str, sorted(counts))) or "no arrays"
        raise TaskError(
            f"the arrays of {what} have {told} examples; all need the same length of their first "
            "axis"
        )
    return counts.pop()


def picked(source: Any, batch: Any) -> Examples:
    """Return the examples of a batch: indices into ``source``, or, without one, the batch."""
    if source is None:
        return batch  # type: ignore[no-any-return]
    return jax.tree.map(lambda part: jnp.take(part, batch, axis=0), source)  # type: ignore[no-any-return]


def call(model: Any, inputs: Any) -> Any:
    """Call a model with a batch: a dict by keywords, a tuple or list by position."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
