"""Counts and lists in words."""

from collections.abc import Collection
from itertools import islice

MOST_NAMES = 12
"""The most names in a sentence; programs get all of them from the fields of an event."""


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, which gets an "s" unless the count is 1.

    >>> plural(1, "round"), plural(1200, "more worker")
    ('1 round', '1,200 more workers')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Collection[object], most: int = MOST_NAMES) -> str:
    """List some names: all, or the first ``most`` and the number of the others.

    >>> listed(["north", "south"]), listed("abcdefg", 5)
    ('north, south', 'a, b, c, d, e and 2 more')
    """
    shown = ", ".join(map(str, islice(names, most)))
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
