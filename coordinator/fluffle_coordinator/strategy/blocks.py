"""Several sets of tensors walked through together, a block of elements at a time.

So that a computation in float64 needs no float64 copy of a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator

from fluffle_common.tensors.weights import Array, Weights

BLOCK = 32 * 1024
"""Elements of a block: a few of them in float64 stay in the processor's cache."""


def in_blocks(first: Weights, *others: Weights, size: int = BLOCK) -> Iterator[tuple[Array, ...]]:
    """Yield the same places of all of them as vectors: views, where tensors are contiguous.

    Args:
        first: its tensors are walked through.
        others: have tensors of the same names and shapes; more names are passed over.
        size: the most elements of a block.

    Example:
        >>> import numpy as np
        >>> a, b = {"w": np.arange(3)}, {"v": np.zeros(9), "w": np.ones(3)}
        >>> [(one.tolist(), other.tolist()) for one, other in in_blocks(a, b, size=2)]
        [([0, 1], [1.0, 1.0]), ([2], [1.0])]
    """
    for name in first:
        vectors = [one[name].reshape(-1) for one in (first, *others)]
        for start in range(0, vectors[0].size, size):
            yield tuple(vector[start : start + size] for vector in vectors)
