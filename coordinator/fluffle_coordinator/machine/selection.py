"""Selection: which of the workers present get work.

A selection is a pure function of the candidates and of a ``Draw``, so the same seed selects the
same workers again. Chance is rendezvous hashing: each worker's lot is a hash of the draw and of its
name, so that a worker that leaves does not reshuffle the others.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple


class Candidate(NamedTuple):
    """A worker that could be selected."""

    name: str
    num_examples: int = 1  # those that it announced
    asked_in: int = 0  # the last round that it was asked in; 0 for none
    train_s: float | None = None  # how long its last training took; None if it has not trained yet
    # The loss and the metrics of its last evaluation; None if it has not evaluated yet.
    evaluation: Mapping[str, float] | None = None


class Draw(NamedTuple):
    """What chance depends on."""

    seed: int  # of the run
    number: int  # the round
    again: int = 0  # how often this round's cohort was drawn before

    def lot(self, name: str) -> bytes:
        """Return a worker's lot: pseudorandom bytes."""
        again = f"/{self.again}" if self.again else ""
        return sha256(f"{self.seed}/{self.number}{again}/{name}".encode()).digest()

    def chance(self, name: str) -> float:
        """Return a worker's lot as a number, uniform over (0, 1]."""
        return (int.from_bytes(self.lot(name)[:7]) + 1) / 2.0**56


Choose = Callable[[Sequence[Candidate], int, Draw], Iterable[str]]


@dataclass(frozen=True)
class Selection:
    """A rule of selection with its settings."""

    name: str  # the value of ``--select``, with its settings
    # Returns the names of the selected workers, given the candidates in the order of their names,
    # how many to select, and the draw.
    choose: Choose
    fixed: bool = True  # whether it selects as many as asked, if there are so many


def sample_size(fraction: float, present: int) -> int:
    """Return how many workers a fraction of those present is, rounded up; at least 1.

    Example:
        >>> sample_size(0.5, 5), sample_size(0.1, 3)
        (3, 1)
    """
    # In binary, 0.1 * 30 is 3.0000000000000004, which must not select a fourth worker.
    return max(1, math.ceil(fraction * present - 1e-9))


def select(
    selection: Selection,
    candidates: Iterable[Candidate],
    count: int,
    draw: Draw,
    last: Collection[str] = (),
    *,
    least: int = 1,
) -> tuple[str, ...]:
    """Return the names of the workers that a rule selects, in order: ``count`` of the candidates.

    Those in ``last`` are selected only when no others are left. A Poisson sample has at least
    ``least`` of them.

    Example:
        >>> present = [Candidate("a"), Candidate("b"), Candidate("c")]
        >>> select(UNIFORM, present, 2, Draw(seed=0, number=1), last=["a"])
        ('b', 'c')
    """
    by_name = sorted(candidates)
    first = [candidate for candidate in by_name if candidate.name not in last]
    others = [candidate for candidate in by_name if candidate.name in last]
    selected: set[str] = set()
    for some, places in ((first, count), (others, count - len(first))):
        if some and places > 0:  # a user's function must choose at least one
            selected |= set(selection.choose(some, min(places, len(some)), draw))
    least = min(least, count)
    if selection == POISSON and len(selected) < least:
        rest = [candidate for candidate in by_name if candidate.name not in selected]
        selected |= set(_uniform(rest, least - len(selected), draw))
    return tuple(candidate.name for candidate in by_name if candidate.name in selected)


def by_chance(workers: Iterable[str], rate: float, draw: Draw) -> list[str]:
    """Return a Poisson sample: each worker is in it with the same chance, so it may be empty."""
    return [name for name in workers if draw.chance(name) <= rate]


def _uniform(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    return sorted((candidate.name for candidate in candidates), key=draw.lot)[:count]


def _poisson(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    """Select each worker independently, with the chance ``count / len(candidates)``."""
    names = [candidate.name for candidate in candidates]
    return by_chance(names, count / max(1, len(names)), draw)


def _weighted(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    """Sample without replacement, at each step in proportion to the numbers of examples.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: the largest keys
    ``u ** (1 / w)``, compared by their logarithms.
    """
    keys = {c.name: math.log(draw.chance(c.name)) / c.num_examples for c in candidates}
    return sorted(keys, key=lambda name: (-keys[name], name))[:count]


def _round_robin(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    """Select the workers that were asked longest ago; lots decide between equals."""
    by_turn = sorted(candidates, key=lambda c: (c.asked_in, draw.lot(c.name)))
    return [candidate.name for candidate in by_turn[:count]]


def _fastest(floor: float, candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    """Select the fastest workers, but fill a fraction of the places, rounded up, in turn.

    Workers that have not trained yet count as the fastest, so that their speed becomes known.
    """
    in_turn = _round_robin(candidates, math.ceil(floor * count - 1e-9), draw)
    others = [candidate for candidate in candidates if candidate.name not in in_turn]
    others.sort(key=lambda c: (c.train_s or 0.0, draw.lot(c.name)))
    return in_turn + [candidate.name for candidate in others[: count - len(in_turn)]]


UNIFORM = Selection("uniform", _uniform)
"""The default."""
_FLOOR = 0.2
POISSON = Selection("poisson", _poisson, fixed=False)
_OTHERS = Selection("weighted", _weighted), Selection("round-robin", _round_robin)
_RULES = {rule.name: rule for rule in (UNIFORM, POISSON, *_OTHERS)}


def parse_selection(text: str) -> Selection:
    """Return the rule that ``--select`` names.

    Raises:
        ValueError: if there is no such rule, or its setting is out of range.
    """
    if text in _RULES:
        return _RULES[text]
    name, _, setting = text.partition(":")
    with contextlib.suppress(ValueError):
        floor = float(setting) if setting else _FLOOR
        if name == "fastest" and 0 <= floor <= 1:
            return Selection(f"fastest:{floor:g}", functools.partial(_fastest, floor))
    raise ValueError(
        f"unknown selection '{text[:60]}'; choose from {', '.join(_RULES)} and fastest[:FLOOR], "
        "with a FLOOR from 0 to 1"
    )
