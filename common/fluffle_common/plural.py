"""Counts in words."""


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, which gets an "s" unless the count is 1.

    >>> plural(1, "round"), plural(1200, "more worker")
    ('1 round', '1,200 more workers')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
