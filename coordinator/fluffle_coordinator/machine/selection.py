"""Who is asked: which of the workers present get work, and how many.

Every rule is a pure function of the candidates and of a draw, (seed, number, draw): the same seed
chooses the same workers again. Chance is rendezvous hashing: each worker draws a lot from (seed,
number, draw, name), so that one worker's leaving does not reshuffle the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple


class Candidate(NamedTuple):
    """A worker that could be asked.

    Args:
        name: its id.
        num_examples: how many examples it announced.
        asked_in: the last round that it was asked in; 0: in none.
        train_s: how long its last training took, in seconds; None: it has not been seen to train.
    """

    name: str
    num_examples: int = 1
    asked_in: int = 0
    train_s: float | None = None


class Draw(NamedTuple):
    """What chance depends on.

    Args:
        seed: the run's.
        number: the round.
        again: how often this round's sample was drawn before.
    """

    seed: int
    number: int
    again: int = 0

    def lot(self, name: str) -> bytes:
        """Return a worker's lot: bytes that are as good as random."""
        again = f"/{self.again}" if self.again else ""
        return sha256(f"{self.seed}/{self.number}{again}/{name}".encode()).digest()

    def chance(self, name: str) -> float:
        """Return a worker's lot as a number, uniform over (0, 1]."""
        return (int.from_bytes(self.lot(name)[:7]) + 1) / 2.0**56


Choose = Callable[[Sequence[Candidate], int, Draw], Iterable[str]]


@dataclass(frozen=True)
class Selection:
    """A rule with its settings.

    Args:
        name: as ``--select`` has it, with its settings.
        choose: given the candidates by their names, how many to choose, and the draw.
        fixed: whether it chooses as many as it is told to, if there are so many; else the size of
            a sample is chance too.
    """

    name: str
    choose: Choose
    fixed: bool = True


def sample_size(fraction: float, present: int) -> int:
    """Return how many of the workers present are asked; at least 1.

    Example:
        >>> sample_size(0.5, 5), sample_size(0.1, 3)
        (3, 1)
    """
    # 0.1 * 30 is 3.0000000000000004 in binary; that is not a fourth worker.
    return max(1, math.ceil(fraction * present - 1e-9))


def select(
    workers: Iterable[str],
    count: int,
    seed: int,
    number: int,
    *,
    draw: int = 0,
    last: Collection[str] = (),
) -> tuple[str, ...]:
    """Draw a uniform sample of the workers, the same for the same seed, round and draw.

    Args:
        workers: who is present.
        count: how many to ask.
        seed: decides the lots.
        number: the round.
        draw: how often this round's sample was drawn before.
        last: who comes after all others, such as those that were asked before and did not answer.

    Example:
        >>> len(select(["a", "b", "c", "d"], 2, seed=0, number=1))
        2
        >>> select(["a", "b", "c"], 2, seed=0, number=1, draw=1, last=["a"])
        ('b', 'c')
    """
    return chosen_by(UNIFORM, map(Candidate, workers), count, Draw(seed, number, draw), last)


def chosen_by(
    selection: Selection,
    candidates: Iterable[Candidate],
    count: int,
    draw: Draw,
    last: Collection[str] = (),
) -> tuple[str, ...]:
    """Let a rule choose; return whom, by name. See ``select`` for ``last``."""
    there = sorted(candidates)
    if selection.fixed and count >= len(there):
        return tuple(one.name for one in there)
    first = [one for one in there if one.name not in last]
    found = set(selection.choose(first, max(0, min(count, len(first))), draw))
    if len(first) < count and len(first) < len(there):
        others = [one for one in there if one.name in last]
        found |= set(selection.choose(others, min(count - len(first), len(others)), draw))
    return tuple(one.name for one in there if one.name in found)


def by_chance(workers: Iterable[str], rate: float, draw: Draw) -> list[str]:
    """Return those whose lot is drawn, each with the same chance; perhaps nobody.

    Example:
        >>> by_chance("abcd", 1.0, Draw(0, 1)), by_chance("abcd", 1e-9, Draw(0, 1))
        (['a', 'b', 'c', 'd'], [])
    """
    return [name for name in workers if draw.chance(name) <= rate]


# --- the rules ---------------------------------------------------------------------------------


def _uniform(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    return sorted((one.name for one in candidates), key=draw.lot)[:count]


def _poisson(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    """Ask each by a chance of its own, as the amplification of privacy by sampling needs it.

    Nobody at all would be no round: then the one with the lowest lot is asked.
    """
    found = by_chance((one.name for one in candidates), count / max(1, len(candidates)), draw)
    return found or _uniform(candidates, 1, draw)


def _weighted(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    """Sample without replacement, each step in proportion to the numbers of examples.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: the largest keys
    ``u ** (1 / w)``, here by their logarithms.
    """
    keys = {one.name: math.log(draw.chance(one.name)) / one.num_examples for one in candidates}
    return sorted(keys, key=lambda name: (-keys[name], name))[:count]


def _round_robin(candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
    """Ask whoever was asked longest ago; lots decide among equals."""
    by_turn = sorted(candidates, key=lambda one: (one.asked_in, draw.lot(one.name)))
    return [one.name for one in by_turn[:count]]


@dataclass(frozen=True)
class _FastestFirst:
    """Ask the fastest; but a part of the places, rounded up, goes round by turns.

    Whoever has not been seen to train counts as the fastest, so that everyone is.
    """

    floor: float

    def __call__(self, candidates: Sequence[Candidate], count: int, draw: Draw) -> list[str]:
        by_turn = math.ceil(self.floor * count - 1e-9)
        found = _round_robin(candidates, by_turn, draw)
        others = [one for one in candidates if one.name not in found]
        others.sort(key=lambda one: (one.train_s or 0.0, draw.lot(one.name)))
        return found + [one.name for one in others[: count - by_turn]]


UNIFORM = Selection("uniform", _uniform)
"""The rule of a run that names none."""
_FLOOR = 0.2
POISSON = Selection("poisson", _poisson, fixed=False)
_RULES = {
    one.name: one
    for one in (
        UNIFORM,
        POISSON,
        Selection("weighted", _weighted),
        Selection("round-robin", _round_robin),
    )
}
NAMES = (*_RULES, "fastest[:FLOOR]")


def parse_selection(text: str) -> Selection:
    """Return the rule that ``--select`` names.

    Raises:
        ValueError: saying what is known.

    Example:
        >>> parse_selection("fastest:0.25").name
        'fastest:0.25'
    """
    if text in _RULES:
        return _RULES[text]
    name, _, given = text.partition(":")
    if name != "fastest":
        raise ValueError(f"'{text[:60]}' is unknown; choose one of {', '.join(NAMES)}")
    try:
        floor = float(given) if given else _FLOOR
    except ValueError:
        floor = math.nan
    if not 0 <= floor <= 1:
        raise ValueError(f"'{text[:60]}' needs a fraction from 0 to 1, as in fastest:{_FLOOR:g}")
    return Selection(f"fastest:{floor:g}", _FastestFirst(floor))
