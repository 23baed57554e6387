"""The weights of a model that learns nothing, and a training that takes next to no time.

Only NumPy, since the workers of other systems use it too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

TENSORS = 8
_COLUMNS = 64
_NOISE = 256 * 1024  # elements; together with a block of the result this stays in the cache


def make_weights(size_bytes: int, seed: int = 0, tensors: int = TENSORS) -> dict[str, Array]:
    """Make float32 tensors of ``size_bytes`` together: equal matrices, and a vector of the rest."""
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
    """Make the random numbers that everyone in this process perturbs with."""
    return np.random.default_rng(0).standard_normal(2 * _NOISE, dtype=np.float32)


class Perturbation:
    """Adds fresh noise to weights, at about the cost of copying them.

    A block of random numbers is made once and used at another scale and from another place in every
    round, so that no two rounds send the same values, and no two workers.

    Args:
        seed: makes one worker's noise its own.
        keep: write into the same arrays each time, since touching fresh memory costs more than the
            sum does; where many workers share a process, memory is worth more than that.
    """

    def __init__(self, seed: int, *, keep: bool = True) -> None:
        self._rng = np.random.default_rng(seed)
        self._keep = keep
        self._results: dict[str, Array] = {}

    def __call__(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        """Return weights that differ from these; where they are kept, good until the next call."""
        start = int(self._rng.integers(_NOISE))
        longest = min(_NOISE, max(tensor.size for tensor in weights.values()))
        scale = np.float32(self._rng.uniform(0.001, 0.01))
        noise = _noise()[start : start + longest] * scale
        results = self._results if self._keep else {}
        for name, tensor in weights.items():
            known = results.get(name)
            if known is None or known.shape != tensor.shape:
                known = results[name] = np.empty(tensor.shape, np.float32)
            _add(tensor.reshape(-1), noise, known.reshape(-1))
        return dict(results)


def _add(values: Array, noise: Array, result: Array) -> None:
    for start in range(0, values.size, noise.size):
        part = values[start : start + noise.size]
        np.add(part, noise[: part.size], out=result[start : start + noise.size])
