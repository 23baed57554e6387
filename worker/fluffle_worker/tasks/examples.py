"""Training data of a task, for any framework: arrays in memory or a stream, and their batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Array
from fluffle_worker.tasks.checks import check_pair, checked_array

Examples = tuple[Any, Any]
"""(inputs, targets): each an array, or a dict, tuple or list of arrays; equal first axes."""
Stream = Callable[[int, np.random.Generator], Iterator[Examples]]
"""``(epoch, rng) -> batches``: called once per epoch, counted from 0."""
MapArrays = Callable[[Callable[[Any], Any], Any], Any]
"""``(function, data) -> data`` with the function applied to each array: ``mapped``, or JAX's."""
_UNDIVIDED = (
    "train_data is a function, so its batches cannot be divided among clients; give arrays, or one "
    "task for each client"
)
_MUCH = 10  # An epoch of so many times num_examples is one that never ends.


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

    ``sample_seed`` decorrelates this worker's order from those of other workers.
    """
    size, left = batch_size_of(plan, count), steps_of(plan, count)
    rng = np.random.default_rng([plan.seed, sample_seed])
    while left:
        order = rng.permutation(count).astype(np.int32)
        filled = np.resize(order, -(-count // size) * size)
        batches = np.split(filled, len(filled) // size)[:left]
        left -= len(batches)
        yield from batches


class InMemory:
    """Arrays that stay on the device, so that a batch is gathered there instead of copied to it.

    ``sample_seed`` decorrelates this worker's batches from those of other workers.
    """

    def __init__(self, source: Examples, num_examples: int, sample_seed: int) -> None:
        self.source: Any = source
        self.num_examples, self._sample_seed = num_examples, sample_seed
        self._rows: Array | None = None  # the examples of a part; None for all

    def targets(self) -> list[Any]:
        """Return the arrays of the targets."""
        targets = arrays_in(self.source[1])
        return targets if self._rows is None else [one[self._rows] for one in targets]

    def part(self, rows: Array, sample_seed: int) -> InMemory:
        """Return the examples with these indices, sharing the arrays."""
        part = copy.copy(self)
        rows = np.asarray(rows, np.int32)
        part._rows = rows if self._rows is None else self._rows[rows]
        part.num_examples, part._sample_seed = len(rows), sample_seed
        return part

    def steps(self, plan: Plan) -> int:
        """Return the number of training steps."""
        return steps_of(plan, self.num_examples)

    def batches(self, plan: Plan) -> Iterator[Array]:
        """Yield the indices of each batch; see ``index_batches``."""
        batches = index_batches(plan, self.num_examples, self._sample_seed)
        return batches if self._rows is None else (self._rows[batch] for batch in batches)


class Streamed:
    """Batches from a callable, for data larger than memory.

    The stream decides on the batch sizes; the step is compiled once per size.

    ``stream`` returns the batches of an epoch, which has ``num_examples``, and ``map_arrays``
    applies a function to each array of a batch, as ``mapped`` does. ``sample_seed`` decorrelates
    each epoch's ``rng`` from those of other workers.

    Raises:
        TaskError: if ``num_examples`` is not given.
    """

    source: Any = None

    def __init__(
        self, stream: Stream, num_examples: int | None, sample_seed: int, map_arrays: MapArrays
    ) -> None:
        if not num_examples:
            raise TaskError(
                "train_data is a function, so its number of examples is unknown; also give "
                "num_examples="
            )
        self.num_examples = num_examples
        self._stream, self._sample_seed, self._map_arrays = stream, sample_seed, map_arrays

    def targets(self) -> list[Any]:
        """See ``part``."""
        raise TaskError(_UNDIVIDED)

    def part(self, rows: Array, sample_seed: int) -> InMemory:
        """Raise a ``TaskError``, because a stream has no parts."""
        raise TaskError(_UNDIVIDED)

    def steps(self, plan: Plan) -> int:
        """Return the expected number of training steps."""
        return plan.steps or plan.epochs * -(-self.num_examples // plan.batch_size)

    def batches(self, plan: Plan) -> Iterator[Examples]:
        """Yield the batches of ``plan.epochs`` epochs or, if set, exactly ``plan.steps`` batches.

        Batches without examples are skipped.

        Raises:
            TaskError: if a batch is not a pair of arrays of numbers, or an epoch yields no batch or
                does not end.
        """
        what = "a batch of train_data"
        done = epoch = 0
        while done < plan.steps if plan.steps else epoch < plan.epochs:
            rng = np.random.default_rng([plan.seed, self._sample_seed, epoch])
            before, seen = done, 0
            for batch in self._stream(epoch, rng):
                check_pair(batch, what)
                checked = self._map_arrays(partial(checked_array, what=what), batch)
                count = count_of(arrays_in(checked, self._map_arrays), what)
                if not count:  # the mean loss of no examples is NaN
                    continue
                seen += count
                if not plan.steps and seen > _MUCH * self.num_examples:
                    raise TaskError(
                        f"train_data yielded {seen} examples in epoch {epoch}, but num_examples is "
                        f"{self.num_examples}; make train_data stop after one epoch, or start "
                        "the coordinator with --steps"
                    )
                yield checked
                done += 1
                if done == plan.steps:
                    return
            if done == before:
                raise TaskError(
                    f"train_data yielded no batch in epoch {epoch}; expected at least one"
                )
            epoch += 1


def count_of(arrays: Sequence[Any], what: str) -> int:
    """Return the number of examples, the length of the first axis of all arrays.

    Raises:
        TaskError: if the arrays differ in it, or there are none.
    """
    counts: set[int] = {array.shape[0] for array in arrays}
    if len(counts) != 1:
        if not counts:
            raise TaskError(f"{what} contains no arrays; expected at least one array")
        raise TaskError(
            f"the arrays of {what} have different numbers of examples "
            f"({', '.join(map(str, sorted(counts)))}); give all arrays the same length along the "
            "first axis"
        )
    return counts.pop()


def joined(targets: Sequence[Array]) -> Array:
    """Return the targets of the examples as labels: one number each, or one row if there are more.

    Example:
        >>> joined([np.array([5, 6]), np.array([[0, 1], [2, 3]])]).tolist()
        [[5, 0, 1], [6, 2, 3]]
    """
    if len(targets) == 1:
        return targets[0]
    return np.concatenate([one.reshape(len(one), -1) for one in targets], axis=1)


def mapped(function: Callable[[Any], Any], data: Any) -> Any:
    """Return an array, or a dict, tuple or list of arrays, with a function applied to each."""
    if isinstance(data, Mapping):
        return {name: mapped(function, part) for name, part in data.items()}
    if isinstance(data, tuple | list):
        parts = [mapped(function, part) for part in data]
        return tuple(parts) if isinstance(data, tuple) else parts
    return function(data)


def arrays_in(data: Any, map_arrays: MapArrays = mapped) -> list[Any]:
    """Return the arrays of such data."""
    arrays: list[Any] = []
    map_arrays(arrays.append, data)
    return arrays


def call(model: Any, inputs: Any) -> Any:
    """Call a model with a batch: a dict by keyword, a tuple or list by position."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def accuracy(outputs: Any, targets: Any) -> Any:
    """Return 1 for each example whose largest output is its target, else 0; shape [batch]."""
    return 1.0 * (outputs.argmax(-1) == targets)
