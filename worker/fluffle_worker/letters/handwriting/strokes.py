"""The pen strokes of letters A to J, before any one person's style.

A letter has several *allographs*, different constructions that readers take for the same letter: an
A may end in a point or in an arch, a J in a hook or in a loop. An allograph is a sequence of
strokes, each from pen-down to pen-up. A stroke is a sequence of knots that the pen passes through.

Coordinates are ``(x, y)`` in hundredths of the height of a plain capital. ``y`` grows downwards,
from 0 at the cap line to 100 at the base line; ``x`` grows to the right from about 0. Descenders
and flourishes exceed that range. Letters are stored as knots instead of outlines, because
``drawing.py`` displaces each knot a little, so that one construction yields endless variants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

LETTERS = "abcdefghij"
"""The letters in class order; lower case like their folders, but drawn as capitals."""

Point: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stroke:
    """One movement of the pen, built from ``pen(x, y)`` by adding lines and curves.

    Args:
        knots: the points that the pen passes through, in order.
        corners: indices of the knots where the pen turns sharply, including both ends. Between two
            consecutive corners, the pen moves smoothly.
    """

    knots: tuple[Point, ...]
    corners: tuple[int, ...]

    def line(self, *knots: Point) -> "Stroke":
        """Return the stroke extended by straight lines to these knots."""
        new = range(len(self.knots), len(self.knots) + len(knots))
        return Stroke(self.knots + knots, (*self.corners, *new))

    def curve(self, *knots: Point) -> "Stroke":
        """Return the stroke extended by a curve through these knots; the last is a corner."""
        last = len(self.knots) + len(knots) - 1
        return Stroke(self.knots + knots, (*self.corners, last))


@dataclass(frozen=True, slots=True)
class Allograph:
    """One construction of a letter.

    Args:
        name: its name, unique within the letter.
        share: how common it is, relative to the other allographs of the letter.
        strokes: the strokes, in order.
    """

    name: str
    share: float
    strokes: tuple[Stroke, ...]


def pen(x: int, y: int) -> Stroke:
    """Return a stroke that starts at ``(x, y)``."""
    return Stroke(((x, y),), (0,))


def _allograph(name: str, share: float, *strokes: Stroke) -> Allograph:
    return Allograph(name, share, strokes)


_A = (
    _allograph("pointed", 3, pen(0, 100).line((38, 0), (76, 100)), pen(12, 66).line((68, 64))),
    _allograph(
        "pointed, in three strokes",
        1,
        pen(40, 0).line((0, 100)),
        pen(38, 2).line((74, 100)),
        pen(14, 60).line((70, 60)),
    ),
    _allograph(
        "round top",
        2,
        pen(2, 100).curve((14, 50), (26, 10), (38, 0), (50, 10), (63, 50), (74, 100)),
        pen(8, 62).line((70, 60)),
    ),
    _allograph(
        "arch",
        2,
        pen(6, 100).curve((8, 50), (18, 12), (36, 0), (54, 10), (64, 50), (66, 100)),
        pen(8, 60).line((64, 60)),
    ),
    _allograph(
        "long rising bar",
        1,
        pen(0, 100).line((42, 0)).curve((58, 50), (72, 100)),
        pen(6, 68).line((90, 54)),
    ),
    _allograph(
        "bar without lifting the pen",
        0.6,
        pen(0, 100).line((36, 0), (72, 100)).curve((62, 72), (40, 62), (10, 64)),
    ),
)

_B = (
    _allograph(
        "stem, then bowls",
        3,
        pen(6, 0).line((14, 100)),
        pen(0, 8)
        .curve((24, -2), (50, 6), (52, 26), (38, 40), (16, 48))
        .curve((46, 48), (66, 66), (52, 88), (28, 98), (6, 102)),
    ),
    _allograph(
        "closed, of one stroke",
        1.5,
        pen(10, 2)
        .line((14, 100), (10, 4))
        .curve((36, 0), (54, 16), (46, 36), (14, 46))
        .curve((48, 50), (62, 74), (44, 96), (14, 100)),
    ),
    _allograph(
        "waist off the stem",
        1.5,
        pen(10, 4).line((18, 102)),
        pen(4, 6)
        .curve((28, -2), (50, 8), (52, 28), (28, 46))
        .curve((54, 54), (64, 76), (46, 94), (10, 100)),
    ),
    _allograph(
        "open below",
        1,
        pen(12, 6).line((14, 100)),
        pen(-3, 14)
        .curve((20, 0), (46, 4), (46, 26), (16, 50))
        .curve((48, 50), (64, 70), (52, 94), (20, 92)),
    ),
    _allograph(
        "angular",
        1,
        pen(10, 0).line((16, 100)),
        pen(2, 2).line((44, 4)).curve((50, 20), (40, 36)).line((16, 46)),
        pen(16, 46).line((48, 54)).curve((60, 74), (50, 96)).line((6, 100)),
    ),
)

_C = (
    _allograph(
        "round", 3, pen(66, 10).curve((40, 0), (12, 18), (0, 54), (14, 88), (40, 100), (68, 88))
    ),
    _allograph("flat top", 2, pen(76, 2).curve((46, 2), (16, 20), (2, 56), (16, 90), (60, 100))),
    _allograph(
        "short foot", 1.5, pen(70, 0).curve((40, 4), (10, 30), (2, 64), (16, 92), (46, 100))
    ),
    _allograph("angular", 1, pen(66, 4).line((24, 6), (2, 52), (20, 96), (68, 96))),
    _allograph(
        "hooked",
        1,
        pen(58, 24).curve((54, 6), (36, 0), (12, 20), (2, 56), (16, 90), (42, 100), (70, 82)),
    ),
)

_D = (
    _allograph(
        "stem, then bowl",
        3,
        pen(12, 2).line((18, 100)),
        pen(6, 4).curve((36, 0), (66, 20), (72, 50), (54, 82), (14, 100)),
    ),
    _allograph(
        "bowl from the left of the stem",
        2,
        pen(12, 6).line((22, 104)),
        pen(-6, 6).curve((28, -2), (60, 12), (72, 46), (56, 80), (18, 102)),
    ),
    _allograph(
        "of one stroke",
        1.5,
        pen(12, 0).line((16, 100), (12, 2)).curve((50, 6), (72, 46), (54, 86), (14, 98)),
    ),
    _allograph(
        "triangular",
        1,
        pen(8, 0).line((18, 100)),
        pen(6, 2).line((40, 6)).curve((64, 28), (72, 58)).line((16, 100)),
    ),
    _allograph(
        "gap at the foot",
        1,
        pen(16, 8).line((20, 94)),
        pen(0, 4).curve((30, 0), (62, 16), (70, 50), (52, 86), (22, 100)),
    ),
)

_E = (
    _allograph(
        "bracket, then bar",
        3,
        pen(72, 2).line((10, 4), (4, 98), (68, 96)),
        pen(8, 46).line((54, 44)),
    ),
    _allograph(
        "stem and three bars",
        2,
        pen(8, 0).line((8, 100)),
        pen(6, 4).line((70, 0)),
        pen(8, 48).line((60, 46)),
        pen(6, 98).line((74, 98)),
    ),
    _allograph(
        "round heel",
        2,
        pen(66, 2).line((18, 6)).curve((8, 50), (6, 86), (20, 100), (58, 92)),
        pen(0, 50).line((54, 40)),
    ),
    _allograph(
        "stem with foot, then bars",
        1.5,
        pen(12, 0).line((4, 98), (66, 100)),
        pen(10, 4).line((78, 0)),
        pen(10, 44).line((72, 44)),
    ),
    _allograph(
        "round back",
        0.5,
        pen(62, 6).curve((30, 0), (6, 30), (6, 70), (30, 100), (66, 92)),
        pen(8, 50).line((52, 48)),
    ),
)

_F = (
    _allograph(
        "roof and stem, then bar", 2, pen(74, 0).line((10, 4), (6, 104)), pen(8, 48).line((56, 46))
    ),
    _allograph(
        "stem, then bars",
        3,
        pen(10, 2).line((8, 104)),
        pen(6, 4).line((74, 0)),
        pen(8, 46).line((58, 46)),
    ),
    _allograph(
        "bars across the stem",
        1.5,
        pen(14, 0).line((10, 104)),
        pen(-2, 6).line((68, 2)),
        pen(0, 54).line((60, 44)),
    ),
    _allograph(
        "hanging roof",
        1,
        pen(16, 0).curve((10, 50), (6, 104)),
        pen(10, 6).curve((40, -2), (64, -2), (70, 6)),
        pen(10, 50).curve((30, 44), (56, 42)),
    ),
    _allograph(
        "detached roof",
        0.8,
        pen(10, 14).line((10, 102)),
        pen(2, 12).curve((6, 0), (30, 0), (68, 0)),
        pen(10, 50).line((54, 50)),
    ),
)

_G = (
    _allograph(
        "shelf turned inwards",
        3,
        pen(64, 4)
        .curve((34, 4), (8, 28), (0, 62), (14, 92), (42, 100), (66, 84), (74, 54))
        .line((36, 56)),
    ),
    _allograph(
        "shelf drawn across",
        2,
        pen(60, 14).curve((40, 0), (12, 16), (0, 56), (14, 90), (36, 100), (58, 88), (66, 56)),
        pen(36, 54).line((82, 50)),
    ),
    _allograph(
        "shelf, then chin",
        1.5,
        pen(68, 6).curve((36, 2), (8, 24), (0, 60), (12, 90), (38, 100), (62, 86)),
        pen(36, 58).line((72, 54), (60, 90)),
    ),
    _allograph(
        "curled in",
        1.5,
        pen(60, 6).curve(
            (32, 4), (6, 34), (2, 72), (20, 98), (48, 94), (66, 70), (58, 54), (38, 58)
        ),
    ),
    _allograph(
        "spur",
        1,
        pen(62, 12).curve((40, 0), (10, 20), (0, 56), (14, 88), (38, 96), (62, 80)),
        pen(38, 56).line((66, 54), (66, 104)),
    ),
)

_H = (
    _allograph(
        "two stems, then bar",
        3,
        pen(4, 2).line((2, 102)),
        pen(51, 0).line((53, 100)),
        pen(4, 52).line((53, 48)),
    ),
    _allograph(
        "bar, then second stem",
        1.5,
        pen(4, 0).line((4, 100)),
        pen(0, 56).line((48, 46)),
        pen(51, 0).line((49, 102)),
    ),
    _allograph(
        "sagging bar",
        1.5,
        pen(0, 4).line((6, 100)),
        pen(2, 44).curve((19, 58), (30, 56), (51, 36)),
        pen(55, 0).line((48, 100)),
    ),
    _allograph(
        "bar hung from the second stem",
        1,
        pen(6, 6).line((6, 100)),
        pen(4, 40).curve((21, 60), (34, 50), (53, 4)).line((49, 100)),
    ),
    _allograph(
        "bar past the stems",
        1,
        pen(8, 0).line((0, 100)),
        pen(48, 2).line((57, 102)),
        pen(-6, 60).line((63, 56)),
    ),
)

_I = (
    _allograph("bar", 3, pen(0, -2).line((0, 104))),
    _allograph("bowed bar", 1, pen(3, -2).curve((-1, 50), (1, 104))),
    _allograph(
        "serifs",
        3,
        pen(16, 0).line((16, 104)),
        pen(0, 2).line((34, -2)),
        pen(0, 106).line((34, 102)),
    ),
    _allograph(
        "short serifs",
        1,
        pen(10, 0).line((10, 106)),
        pen(0, 2).line((22, 0)),
        pen(2, 106).line((22, 104)),
    ),
    _allograph(
        "of one stroke", 1, pen(0, 2).line((28, 0), (14, 2), (14, 104), (0, 106), (32, 102))
    ),
)

_J = (
    _allograph(
        "flag and hook", 3, pen(5, 4).line((34, 0)).curve((34, 60), (31, 102), (17, 114), (2, 100))
    ),
    _allograph(
        "drooping flag and hook",
        1.5,
        pen(5, 18).curve((5, 4), (31, 0)).curve((32, 50), (32, 90), (24, 110), (8, 108), (3, 94)),
    ),
    _allograph(
        "loop",
        2,
        pen(5, 6).line((31, 2)).curve((32, 60), (29, 102), (15, 118), (8, 104), (22, 88), (44, 70)),
    ),
    _allograph(
        "closed loop",
        0.8,
        pen(7, 6).line((31, 2)).curve((32, 60), (31, 106), (17, 116), (7, 102), (17, 88), (31, 84)),
    ),
    _allograph(
        "roof across",
        1.5,
        pen(3, 2).line((48, 0)),
        pen(32, 0).curve((32, 60), (29, 98), (15, 110), (0, 94)),
    ),
    _allograph("no roof", 0.8, pen(36, -2).curve((36, 60), (32, 96), (19, 108), (5, 100), (0, 84))),
    _allograph("angular", 1, pen(8, 2).line((32, 0), (32, 108), (12, 108))),
)

ALLOGRAPHS: Mapping[str, tuple[Allograph, ...]] = dict(
    zip(LETTERS, (_A, _B, _C, _D, _E, _F, _G, _H, _I, _J), strict=True)
)
"""The allographs of each letter."""
