"""How a report says things: numbers, sizes, durations and settings in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return the leaves of a configuration by their names, in words."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{above}{key}".replace("_", " ")
        if key == "quorum" and isinstance(value, Mapping):
            number, fraction = value.get("number"), value.get("fraction", 1.0)
            of_asked = "all" if fraction == 1 else f"{fraction:.0%} of those asked"
            leaves["quorum"] = str(number) if number else of_asked
        elif isinstance(value, Mapping) and value:
            inside = "" if key in ("rules", "plan") else f"{name} "
            leaves.update(flat(value, inside))
        elif key.endswith("_s") and isinstance(value, int | float):
            leaves[name.removesuffix(" s")] = duration(value)
        else:
            leaves[name] = words(value)
    return leaves


def words(value: Any) -> str:
    """Return any value of JSON in words."""
    if value in (None, [], {}, ""):
        return "-"
    match value:
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case list():
            return ", ".join(map(str, value))
    return json.dumps(value)


def as_metric(name: str) -> Callable[[float], str]:
    """Return how the values of a metric are written."""
    return percent if name == "accuracy" else short


def percent(value: float) -> str:
    """Return a fraction as a percentage.

    >>> percent(1.0), percent(0.93333), percent(0.2)
    ('100%', '93.3%', '20%')
    """
    return f"{100 * value:.3g}%"


def share(value: float) -> str:
    """Return the share that something has of a whole.

    >>> share(0.5), share(0.002), share(0.0)
    ('50%', '<1%', '0%')
    """
    return "<1%" if 0 < value < 0.01 else f"{value:.0%}"


def short(value: float) -> str:
    """Return a number in four digits."""
    return f"{value:.4g}"


def four(value: float | None) -> str:
    """Return a number to four places, nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


def count(number: int) -> str:
    """Return a number in at most five signs.

    >>> count(250), count(9999), count(12_345), count(4_200_000)
    ('250', '9999', '12.3k', '4.2M')
    """
    if number < 10_000:
        return str(number)
    unit, of = ("k", 10**3) if number < 10**6 else ("M", 10**6) if number < 10**9 else ("G", 10**9)
    return f"{number / of:.3g}{unit}"


def size(number: int) -> str:
    """Return a size, in units of a thousand.

    >>> size(999), size(1_362_000), size(0)
    ('999 B', '1.36 MB', '0 B')
    """
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(value: float) -> str:
    """Return a duration in the unit that suits it.

    >>> duration(0.0123), duration(3.21), duration(125), duration(7260), duration(0)
    ('12 ms', '3.2 s', '2 min 5 s', '2 h 1 min', '0 s')
    """
    if value == 0:
        return "0 s"
    if value < 1:
        return f"{value * 1000:.2g} ms" if value < 0.01 else f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.3g} s" if value >= 10 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def moment(time: str) -> str:
    """Return a moment of the history without its milliseconds.

    >>> moment("2026-03-01T12:30:45.123+00:00")
    '2026-03-01 12:30:45 UTC'
    """
    return f"{time[:19].replace('T', ' ')} UTC"
