"""The pen strokes of letters A to J, before any one person's style.

A letter has several *allographs*, different constructions that readers take for the same letter: an
A may end in a point or in an arch, a J in a hook or in a loop.

An allograph is written like an SVG path: ``M`` puts the pen down at a knot, ``L`` draws straight
lines to the next knots, and ``R`` draws one curve through them (SVG has no such command). Letters
are stored as knots instead of outlines, because ``drawing.py`` displaces each knot a little, so
that one construction yields endless variants.

Coordinates are ``x,y`` in hundredths of the height of a plain capital. ``y`` grows downwards, from
0 at the cap line to 100 at the base line; ``x`` grows to the right from about 0. Descenders and
flourishes exceed that range.
"""

import re
from dataclasses import dataclass
from typing import TypeAlias

LETTERS = "abcdefghij"
"""The letters in class order; lower case like their folders, but drawn as capitals."""

Point: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stroke:
    """One movement of the pen."""

    knots: tuple[Point, ...]  # the points that the pen passes through, in order
    # The indices of the knots where the pen turns sharply, including both ends. Between two
    # consecutive corners, the pen moves smoothly.
    corners: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Allograph:
    """One construction of a letter."""

    name: str  # unique within the letter
    share: float  # how common it is, relative to the other allographs of the letter
    strokes: tuple[Stroke, ...]  # in order


def parse_strokes(path: str) -> tuple[Stroke, ...]:
    """Return the strokes of a path such as ``M0,100 L38,0 76,100 M12,66 L68,64``."""
    strokes = []
    for drawn in path.split("M")[1:]:
        knots: list[Point] = []
        corners: list[int] = []
        for command, points in re.findall("([LR]?)([^LR]+)", drawn):
            first = len(knots)
            for point in points.split():
                x, y = point.split(",")
                knots.append((int(x), int(y)))
            last = len(knots) - 1
            corners += [last] if command == "R" else range(first, len(knots))
        strokes.append(Stroke(tuple(knots), tuple(corners)))
    return tuple(strokes)


_SHAPES = {
    "a": (
        ("pointed", 3, "M0,100 L38,0 76,100 M12,66 L68,64"),
        ("pointed, in three strokes", 1, "M40,0 L0,100 M38,2 L74,100 M14,60 L70,60"),
        ("round top", 2, "M2,100 R14,50 26,10 38,0 50,10 63,50 74,100 M8,62 L70,60"),
        ("arch", 2, "M6,100 R8,50 18,12 36,0 54,10 64,50 66,100 M8,60 L64,60"),
        ("long rising bar", 1, "M0,100 L42,0 R58,50 72,100 M6,68 L90,54"),
        ("bar without lifting the pen", 0.6, "M0,100 L36,0 72,100 R62,72 40,62 10,64"),
    ),
    "b": (
        (
            "stem, then bowls",
            3,
            "M6,0 L14,100 M0,8 R24,-2 50,6 52,26 38,40 16,48 R46,48 66,66 52,88 28,98 6,102",
        ),
        (
            "closed, of one stroke",
            1.5,
            "M10,2 L14,100 10,4 R36,0 54,16 46,36 14,46 R48,50 62,74 44,96 14,100",
        ),
        (
            "waist off the stem",
            1.5,
            "M10,4 L18,102 M4,6 R28,-2 50,8 52,28 28,46 R54,54 64,76 46,94 10,100",
        ),
        ("open below", 1, "M12,6 L14,100 M-3,14 R20,0 46,4 46,26 16,50 R48,50 64,70 52,94 20,92"),
        (
            "angular",
            1,
            "M10,0 L16,100 M2,2 L44,4 R50,20 40,36 L16,46 M16,46 L48,54 R60,74 50,96 L6,100",
        ),
    ),
    "c": (
        ("round", 3, "M66,10 R40,0 12,18 0,54 14,88 40,100 68,88"),
        ("flat top", 2, "M76,2 R46,2 16,20 2,56 16,90 60,100"),
        ("short foot", 1.5, "M70,0 R40,4 10,30 2,64 16,92 46,100"),
        ("angular", 1, "M66,4 L24,6 2,52 20,96 68,96"),
        ("hooked", 1, "M58,24 R54,6 36,0 12,20 2,56 16,90 42,100 70,82"),
    ),
    "d": (
        ("stem, then bowl", 3, "M12,2 L18,100 M6,4 R36,0 66,20 72,50 54,82 14,100"),
        (
            "bowl from the left of the stem",
            2,
            "M12,6 L22,104 M-6,6 R28,-2 60,12 72,46 56,80 18,102",
        ),
        ("of one stroke", 1.5, "M12,0 L16,100 12,2 R50,6 72,46 54,86 14,98"),
        ("triangular", 1, "M8,0 L18,100 M6,2 L40,6 R64,28 72,58 L16,100"),
        ("gap at the foot", 1, "M16,8 L20,94 M0,4 R30,0 62,16 70,50 52,86 22,100"),
    ),
    "e": (
        ("bracket, then bar", 3, "M72,2 L10,4 4,98 68,96 M8,46 L54,44"),
        ("stem and three bars", 2, "M8,0 L8,100 M6,4 L70,0 M8,48 L60,46 M6,98 L74,98"),
        ("round heel", 2, "M66,2 L18,6 R8,50 6,86 20,100 58,92 M0,50 L54,40"),
        ("stem with foot, then bars", 1.5, "M12,0 L4,98 66,100 M10,4 L78,0 M10,44 L72,44"),
        ("round back", 0.5, "M62,6 R30,0 6,30 6,70 30,100 66,92 M8,50 L52,48"),
    ),
    "f": (
        ("roof and stem, then bar", 2, "M74,0 L10,4 6,104 M8,48 L56,46"),
        ("stem, then bars", 3, "M10,2 L8,104 M6,4 L74,0 M8,46 L58,46"),
        ("bars across the stem", 1.5, "M14,0 L10,104 M-2,6 L68,2 M0,54 L60,44"),
        ("hanging roof", 1, "M16,0 R10,50 6,104 M10,6 R40,-2 64,-2 70,6 M10,50 R30,44 56,42"),
        ("detached roof", 0.8, "M10,14 L10,102 M2,12 R6,0 30,0 68,0 M10,50 L54,50"),
    ),
    "g": (
        ("shelf turned inwards", 3, "M64,4 R34,4 8,28 0,62 14,92 42,100 66,84 74,54 L36,56"),
        ("shelf drawn across", 2, "M60,14 R40,0 12,16 0,56 14,90 36,100 58,88 66,56 M36,54 L82,50"),
        ("shelf, then chin", 1.5, "M68,6 R36,2 8,24 0,60 12,90 38,100 62,86 M36,58 L72,54 60,90"),
        ("curled in", 1.5, "M60,6 R32,4 6,34 2,72 20,98 48,94 66,70 58,54 38,58"),
        ("spur", 1, "M62,12 R40,0 10,20 0,56 14,88 38,96 62,80 M38,56 L66,54 66,104"),
    ),
    "h": (
        ("two stems, then bar", 3, "M4,2 L2,102 M51,0 L53,100 M4,52 L53,48"),
        ("bar, then second stem", 1.5, "M4,0 L4,100 M0,56 L48,46 M51,0 L49,102"),
        ("sagging bar", 1.5, "M0,4 L6,100 M2,44 R19,58 30,56 51,36 M55,0 L48,100"),
        ("bar hung from the second stem", 1, "M6,6 L6,100 M4,40 R21,60 34,50 53,4 L49,100"),
        ("bar past the stems", 1, "M8,0 L0,100 M48,2 L57,102 M-6,60 L63,56"),
    ),
    "i": (
        ("bar", 3, "M0,-2 L0,104"),
        ("bowed bar", 1, "M3,-2 R-1,50 1,104"),
        ("serifs", 3, "M16,0 L16,104 M0,2 L34,-2 M0,106 L34,102"),
        ("short serifs", 1, "M10,0 L10,106 M0,2 L22,0 M2,106 L22,104"),
        ("of one stroke", 1, "M0,2 L28,0 14,2 14,104 0,106 32,102"),
    ),
    "j": (
        ("flag and hook", 3, "M5,4 L34,0 R34,60 31,102 17,114 2,100"),
        ("drooping flag and hook", 1.5, "M5,18 R5,4 31,0 R32,50 32,90 24,110 8,108 3,94"),
        ("loop", 2, "M5,6 L31,2 R32,60 29,102 15,118 8,104 22,88 44,70"),
        ("closed loop", 0.8, "M7,6 L31,2 R32,60 31,106 17,116 7,102 17,88 31,84"),
        ("roof across", 1.5, "M3,2 L48,0 M32,0 R32,60 29,98 15,110 0,94"),
        ("no roof", 0.8, "M36,-2 R36,60 32,96 19,108 5,100 0,84"),
        ("angular", 1, "M8,2 L32,0 32,108 12,108"),
    ),
}

ALLOGRAPHS = {
    letter: tuple(Allograph(name, share, parse_strokes(path)) for name, share, path in shapes)
    for letter, shapes in _SHAPES.items()
}
"""The allographs of each letter."""
