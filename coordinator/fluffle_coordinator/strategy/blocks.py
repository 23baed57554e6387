"""Iteration over tensors together, a block of elements at a time.

It allows a computation in float64 without a float64 copy of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator

from fluffle_common.tensors.weights import Array, Weights

BLOCK = 32 * 1024
"""Elements per block: a few blocks of float64 fit into the processor's cache."""


def cut(*arrays: Array, size: int | None = None) -> Iterator[tuple[Array, ...]]:
    """Yield corresponding blocks of arrays whose last axes have the same length, as views."""
    step = size or BLOCK
    for start in range(0, arrays[0].shape[-1], step):
        yield tuple([array[..., start : start + step] for array in arrays])


def in_blocks(
    first: Weights, *others: Weights, size: int | None = None
) -> Iterator[tuple[Array, ...]]:
    """Yield corresponding blocks of all sets, as vectors: views if the tensors are contiguous.

    Args:
        first: the tensors to iterate over.
        others: tensors of the same names and shapes; further names are ignored.
        size: the most elements per block; ``BLOCK`` if None.

    Example:
        >>> import numpy as np
        >>> a, b = {"w": np.arange(3)}, {"v": np.zeros(9), "w": np.ones(3)}
        >>> [(one.tolist(), other.tolist()) for one, other in in_blocks(a, b, size=2)]
        [([0, 1], [1.0, 1.0]), ([2], [1.0])]
    """
    for name in first:
        yield from cut(*(one[name].reshape(-1) for one in (first, *others)), size=size)
