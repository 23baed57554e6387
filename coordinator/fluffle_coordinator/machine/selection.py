"""Which of the workers present are asked in a round."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from hashlib import sha256


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
    """Draw a sample of the workers, the same for the same seed, round and draw.

    Each worker draws a lot from (seed, number of the round, draw, name) and the lowest are asked
    (rendezvous hashing), so that one worker's leaving does not reshuffle the others.

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
    names = sorted(workers)
    if count >= len(names):
        return tuple(names)
    again = f"/{draw}" if draw else ""

    def lot(name: str) -> tuple[bool, bytes]:
        return name in last, sha256(f"{seed}/{number}{again}/{name}".encode()).digest()

    return tuple(sorted(sorted(names, key=lot)[: max(0, count)]))
