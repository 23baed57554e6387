"""Personal tensors: what a task keeps from one round of a run to later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fluffle_worker.local.base import Named

_ROUNDS_KEPT = 2  # a round that is trained again needs what the one before it kept


class _Round(NamedTuple):
    run: str
    number: int
    arrays: Named


class Personal:
    """Named arrays, by the run and the round that kept them; in memory only.

    A round that is trained again begins with what it began with the first time.

    >>> kept = Personal()
    >>> kept.keep("r", 1, {"w": 0.5})
    >>> kept.before("r", 2), kept.before("r", 1), kept.before("another", 2)
    ({'w': array(0.5)}, {}, {})
    """

    def __init__(self) -> None:
        self._rounds: list[_Round] = []

    def before(self, run: str, number: int) -> Named:
        """Return what the last round of a run before this one kept; nothing if there is none."""
        earlier = [one for one in self._rounds if one.run == run and one.number < number]
        return max(earlier, key=lambda one: one.number).arrays if earlier else {}

    def latest(self) -> Named:
        """Return what was kept last."""
        return self._rounds[-1].arrays if self._rounds else {}

    def keep(self, run: str, number: int, arrays: Mapping[str, Any]) -> None:
        """Keep copies of arrays as what this round leaves."""
        kept = _Round(run, number, {name: np.array(array) for name, array in arrays.items()})
        others = [one for one in self._rounds if (one.run, one.number) != (run, number)]
        self._rounds = [*others, kept][-_ROUNDS_KEPT:]
