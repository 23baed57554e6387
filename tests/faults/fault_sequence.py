"""Generates the sequence of faults of a chaos run from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults.proxy import Side

WORKERS = 4
# The frequency of each kind among a hundred; each occurs at least once among the first twelve.
# Stops and alarms are rarer because they take much time.
KINDS = {
    "coordinator": 13,
    "worker": 15,
    "both": 8,
    "broker": 6,
    "cut": 12,
    "stall": 8,
    "half-close": 8,
    "slow": 8,
    "replay": 7,
    "garbage": 7,
    "stop": 4,
    "alarm": 4,
}
_FOR_S = {"alarm": (2.0, 19.0), "slow": (5.0, 30.0)}
_USUALLY_FOR_S = (0.5, 6.0)
_GO_ON = frozenset({"stall", "half-close", "slow"})
_SIDES: tuple[Side, ...] = ("client", "broker")


@dataclass(frozen=True)
class Fault:
    """A fault, ``after_s`` seconds after the previous one was done."""

    kind: str
    after_s: float
    who: int  # the number of the worker, or whether to use the standby coordinator
    share: float  # of the connections
    for_s: float
    side: Side
    seed: int  # for all other choices

    @property
    def lasts_s(self) -> float:
        """How long it lasts while the next faults begin."""
        return self.for_s if self.kind in _GO_ON else 0.0


def fault_sequence(seed: int, faults: int) -> list[Fault]:
    """Return the faults, which depend only on the seed.

    Example:
        >>> fault_sequence(7, 100) == fault_sequence(7, 100) != fault_sequence(8, 100)
        True
    """
    rng = random.Random(seed)
    first = rng.sample(list(KINDS), len(KINDS))
    rest = rng.choices(list(KINDS), list(KINDS.values()), k=faults)
    return [
        Fault(
            kind=kind,
            after_s=round(rng.uniform(0.2, 2.5), 2),
            who=rng.randrange(WORKERS),
            share=rng.choice((0.1, 0.3, 0.6, 1.0)),
            for_s=round(rng.uniform(*_FOR_S.get(kind, _USUALLY_FOR_S)), 1),
            side=rng.choice(_SIDES),
            seed=rng.randrange(2**32),
        )
        for kind in (first + rest)[:faults]
    ]
