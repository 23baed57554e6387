"""Weights of a given size, and a "training" that costs about as much as copying them.

Only NumPy is imported, because the workers of other systems use this module too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

TENSORS = 8
_COLUMNS = 64
_NOISE = 256 * 1024  # elements; noise and a block of the result fit into the CPU cache together


def make_weights(size_bytes: int, seed: int = 0, tensors: int = TENSORS) -> dict[str, Array]:
    """Return float32 tensors of ``size_bytes`` in total: equal matrices and one vector."""
    elements = max(1, size_bytes // 4)
    rows = elements // tensors // _COLUMNS
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    if rows:
        shapes = {f"layer{n}/kernel": (rows, _COLUMNS) for n in range(1, tensors)}
    rest = elements - len(shapes) * rows * _COLUMNS
    return {
        name: rng.standard_normal(shape, dtype=np.float32)
        for name, shape in {**shapes, "last/bias": (rest,)}.items()
    }


@functools.cache
def _noise() -> Array:
    """Return the random numbers that all perturbations in this process share."""
    return np.random.default_rng(0).standard_normal(2 * _NOISE, dtype=np.float32)


class Perturbation:
    """Adds noise to weights, at about the cost of copying them.

    One block of random numbers is reused with a different scale and offset each time, so that no
    two rounds and no two workers send the same values.

    Args:
        seed: determines this worker's noise.
        keep: whether to reuse the result's arrays. That is faster, because touching new memory
            costs more than the sum, but holds memory in a process of many workers.
    """

    def __init__(self, seed: int, *, keep: bool = True) -> None:
        self._rng = np.random.default_rng(seed)
        self._keep = keep
        self._results: dict[str, Array] = {}

    def __call__(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Return perturbed weights; with ``keep``, they are valid until the next call."""
        start = int(self._rng.integers(_NOISE))
        longest = min(_NOISE, max(tensor.size for tensor in weights.values()))
        scale = np.float32(self._rng.uniform(0.001, 0.01))
        noise = _noise()[start : start + longest] * scale
        results = self._results if self._keep else {}
        for name, tensor in weights.items():
            result = results.get(name)
            if result is None or result.shape != tensor.shape:
                result = results[name] = np.empty(tensor.shape, np.float32)
            _add(tensor.reshape(-1), noise, result.reshape(-1))
        return dict(results)


def _add(values: Array, noise: Array, result: Array) -> None:
    for start in range(0, values.size, noise.size):
        part = values[start : start + noise.size]
        np.add(part, noise[: part.size], out=result[start : start + noise.size])
