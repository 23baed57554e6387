"""Draws the letters A to J as people do, for whoever has no handwriting at hand.

Every client is one writer. A writer has a :class:`Style`: favourite constructions of each letter,
a favourite pen, a slant, a size, a place on the page, a steadier or a less steady hand. Each image
is then one attempt of that writer, and no two attempts are alike::

    allograph ──> knots moved ──> pen's path ──> size, slant, turn ──> hand and mouse ──> pixels
    (strokes.py)  (_attempt)      (_trace)       (_posed)              (_unsteady)        (_ink)

All chance comes from generators seeded with ``(seed, writer)``: the same seed draws the same bytes,
and a client's letters do not depend on how many clients there are.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fluffle_common.errors import UsageError
from fluffle_worker.letters.handwriting.strokes import ALLOGRAPHS, LETTERS, Allograph, Stroke

SIDE_PX = 100
"""Width and height of every image."""

PENS_PX = (2.0, 4.0, 6.5)
"""Widths of the pens that a drawing program offers: fine, medium, broad."""

# Where the middle of a letter tends to lie, from the middle of the page to the right, in pixels: as
# people were seen to place them who drew one letter after the other.
_OFFSETS_PX = dict(
    zip(LETTERS, (-1.5, 1.0, -3.5, 1.5, 3.0, 6.0, -1.0, -2.0, 2.5, -0.5), strict=True)
)

_SCATTER_PX = (7.5, 4.0)  # standard deviation of that place from attempt to attempt, (x, y)
_MARGIN_PX = 1.5  # black left at every edge, so that no letter is cut off
_SUPERSAMPLING = 4  # drawn this many times too large, then averaged: that makes the grey edges
_CURVE_STEPS = 12  # points between two knots of a curve

Path2D: TypeAlias = NDArray[np.float64]
"""A pen's path, shape (points, 2), columns x and y."""


@dataclass(frozen=True, slots=True)
class Style:
    """How one person writes. Lengths with ``_px`` are pixels, plain ones shares of letter height.

    Attributes:
        allographs: for every letter the chances of its allographs, in their order, summing to 1.
        pens: the chances of :data:`PENS_PX`, in their order, summing to 1.
        habit: seed of this person's own lasting shape of each allograph.
        height_px: height of a plain capital.
        width: stretch of the x axis; 1 leaves the letters as they are in :mod:`.strokes`.
        slant: shift to the right per unit of height; positive leans forward.
        turn: clockwise rotation of the letter, in radians.
        centre_px: where the middle of the letter comes to lie, ``(x, y)``.
        wobble: standard deviation of a knot's place from one attempt to the next.
        tremor_px: standard deviation of the hand's deviation from its path.
        stride_px: distance between two positions the mouse reports; straight in between.
        rounding: length over which sharp corners are smoothed.
        overshoot: how far strokes go on beyond their ends; negative stops short.
    """

    allographs: Mapping[str, tuple[float, ...]]
    pens: tuple[float, ...]
    habit: int
    height_px: float
    width: float
    slant: float
    turn: float
    centre_px: tuple[float, float]
    wobble: float
    tremor_px: float
    stride_px: float
    rounding: float
    overshoot: float


def writer_style(rng: np.random.Generator, favourite_pen: int) -> Style:
    """Make up a person.

    Args:
        rng: the source of all chance.
        favourite_pen: index into :data:`PENS_PX` of the pen this person mostly takes.

    Returns:
        A style; generators in the same state yield equal ones.
    """
    pens = np.full(len(PENS_PX), 0.15)
    pens[favourite_pen] += 1.0 - pens.sum()
    return Style(
        allographs={letter: _preferences(ALLOGRAPHS[letter], rng) for letter in LETTERS},
        pens=tuple(pens.tolist()),
        habit=int(rng.integers(2**32)),
        height_px=float(np.clip(rng.normal(66, 2), 58, 76)),
        width=float(rng.uniform(0.92, 1.06)),
        slant=float(rng.normal(0.02, 0.04)),
        turn=float(rng.normal(0, 0.02)),
        centre_px=(float(rng.normal(48, 2)), float(rng.normal(51, 1.5))),
        wobble=float(rng.uniform(0.02, 0.035)),
        tremor_px=float(rng.uniform(0.2, 0.7)),
        stride_px=float(rng.uniform(2, 8)),
        rounding=float(rng.uniform(0.0, 0.1)),
        overshoot=float(rng.normal(0.01, 0.02)),
    )


def draw_letter(letter: str, style: Style, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one attempt of a person at a letter.

    Args:
        letter: one of :data:`~fluffle_worker.letters.handwriting.strokes.LETTERS`.
        style: the person.
        rng: the source of this attempt's chance.

    Returns:
        The image, shape (100, 100), dtype uint8, the strokes 255 on 0 with grey edges. All ink is
        inside the frame.

    Raises:
        KeyError: there is no such letter.
    """
    shapes = ALLOGRAPHS[letter]
    chosen = int(rng.choice(len(shapes), p=style.allographs[letter]))
    # The lasting deviation must be the same at every attempt, hence a generator of its own.
    habit = np.random.default_rng([style.habit, LETTERS.index(letter), chosen])
    pen_px = float(rng.choice(PENS_PX, p=style.pens) * rng.uniform(0.95, 1.08))
    paths = [_attempt(stroke, style, habit, rng) for stroke in shapes[chosen].strokes]
    paths = _posed(paths, style, rng)
    paths = [_unsteady(path, style, rng) for path in paths]
    place = rng.normal(style.centre_px, _SCATTER_PX) + np.array([_OFFSETS_PX[letter], 0.0])
    return _ink(_framed(paths, pen_px, place), pen_px)


def draw_letters(
    out: Path,
    *,
    clients: int = 3,
    per_client: int = 250,
    unseen: int = 0,
    seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw a data set: ``out/client-<N>/<letter>/<nnnn>.png``, 8-bit grey, ``N`` from 1.

    The writers' folders appear once all letters are drawn; a run that fails before leaves none.

    Args:
        out: the folder to fill; made if need be, with its parents.
        clients: how many writers.
        per_client: images of each writer, all letters together.
        unseen: how many more writers, in ``out/writer-<N>``; ``N`` goes on from the clients'.
        seed: equal seeds draw equal bytes.
        progress: called after every image with the number of images drawn and of all.

    Raises:
        UsageError: ``out`` holds something already or is no folder, or a number is out of range.
        OSError: the disk is full, or may not be written to.
    """
    least = {"clients": 1, "per_client": len(LETTERS), "unseen": 0, "seed": 0}
    given = {"clients": clients, "per_client": per_client, "unseen": unseen, "seed": seed}
    for name, value in given.items():
        if value < least[name]:
            raise UsageError(f"cannot draw: {name} is {value}, but must be at least {least[name]}")
    # Inside `out`, not beside it: moving stays on one file system even if `out` is a mount point.
    unfinished = out / ".unfinished"
    if out.exists() and not (out.is_dir() and set(out.iterdir()) <= {unfinished}):
        raise UsageError(f"{out} is not an empty folder: choose a new one, or remove it first")

    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        done, writers = 0, clients + unseen
        for writer in range(1, writers + 1):
            owner = f"client-{writer}" if writer <= clients else f"writer-{writer}"
            for name, image in _letters_of(writer, per_client, seed):
                path = unfinished / owner / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
                done += 1
                if progress is not None:
                    progress(done, writers * per_client)
        for folder in sorted(unfinished.iterdir()):
            folder.rename(out / folder.name)
    finally:
        shutil.rmtree(unfinished)


def _letters_of(writer: int, per_client: int, seed: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield all letters of one writer, each with its path inside the writer's folder."""
    rng = np.random.default_rng([seed, writer])
    # Favourite pens go round: even three writers differ in what a glance sees first.
    style = writer_style(rng, favourite_pen=writer % len(PENS_PX))
    for letter, count in zip(LETTERS, _class_counts(per_client, rng), strict=True):
        for number in range(count):
            yield f"{letter}/{number:04d}.png", draw_letter(letter, style, rng)


def _class_counts(total: int, rng: np.random.Generator) -> list[int]:
    """Split ``total`` into a count per letter, at least 1 each and not all equal."""
    shares = rng.dirichlet(np.full(len(LETTERS), 50.0))
    spare = total - len(LETTERS)
    ends = np.rint(np.cumsum(shares) * spare).astype(int)
    ends[-1] = spare
    return [1 + int(count) for count in np.diff(ends, prepend=0)]


def _preferences(shapes: tuple[Allograph, ...], rng: np.random.Generator) -> tuple[float, ...]:
    """Draw a person's chances of a letter's allographs: favourites, the others now and then."""
    common = np.array([shape.share for shape in shapes], dtype=np.float64)
    common /= common.sum()
    own = rng.dirichlet(2.0 * common)
    return tuple((0.65 * own + 0.35 * common).tolist())


def _attempt(
    stroke: Stroke, style: Style, habit: np.random.Generator, rng: np.random.Generator
) -> Path2D:
    """Move a stroke's knots, then run the pen through them, in units of the letter's height."""
    knots = np.array(stroke.knots) / 100
    knots += habit.normal(0, 0.02, knots.shape) + rng.normal(0, style.wobble, knots.shape)
    path = _trace(knots, stroke.corners)
    return _extended(_rounded(path, style.rounding), style.overshoot, rng)


def _trace(knots: Path2D, corners: tuple[int, ...]) -> Path2D:
    """Run smoothly through the knots, turning sharply at ``corners``.

    Between two corners the path is a Catmull-Rom spline, which needs no control points besides the
    knots themselves; at a corner it ends and the next one begins.
    """
    pieces = [knots[:1]]
    for first, last in pairwise(corners):
        run = knots[first : last + 1]
        # Mirrored, so that the end pieces have a knot on either side too.
        padded = np.vstack([2 * run[0] - run[1], run, 2 * run[-1] - run[-2]])
        t = np.linspace(0, 1, _CURVE_STEPS + 1)[1:, None]
        for before, start, end, after in zip(
            padded, padded[1:], padded[2:], padded[3:], strict=False
        ):
            linear = end - before
            square = 2 * before - 5 * start + 4 * end - after
            cube = 3 * (start - end) + after - before
            pieces.append(start + (linear * t + square * t**2 + cube * t**3) / 2)
    return np.vstack(pieces)


def _rounded(path: Path2D, length: float) -> Path2D:
    """Smooth a path's corners over about ``length``; its ends stay where they are."""
    even = _resampled(path, 0.02)
    reach = round(length / 0.02 / 2)
    padded = np.pad(even, ((reach, reach), (0, 0)), mode="edge")
    window = np.full(2 * reach + 1, 1 / (2 * reach + 1))
    smooth = np.column_stack([np.convolve(padded[:, axis], window, "valid") for axis in (0, 1)])
    smooth[[0, -1]] = even[[0, -1]]
    return smooth


def _extended(path: Path2D, overshoot: float, rng: np.random.Generator) -> Path2D:
    """Move both ends of a path along its direction by about ``overshoot``."""
    before, after = rng.normal(overshoot, 0.02, 2)
    start, end = path[0] - path[1], path[-1] - path[-2]
    start *= before / max(float(np.hypot(*start)), 1e-6)
    end *= after / max(float(np.hypot(*end)), 1e-6)
    return np.vstack([path[0] + start, path[1:-1], path[-1] + end])


def _resampled(path: Path2D, step: float) -> Path2D:
    """Return points along a path about ``step`` apart, its two ends among them."""
    lengths = np.hypot(*np.diff(path, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    places = np.linspace(0, along[-1], max(2, round(along[-1] / step) + 1))
    return np.column_stack([np.interp(places, along, path[:, axis]) for axis in (0, 1)])


def _posed(paths: list[Path2D], style: Style, rng: np.random.Generator) -> list[Path2D]:
    """Size, slant and turn a letter's strokes alike; the result is in pixels."""
    height = style.height_px * np.exp(rng.normal(0, 0.07))
    width = height * style.width * np.exp(rng.normal(0, 0.1))
    slant = style.slant + rng.normal(0, 0.05)
    turn = style.turn + rng.normal(0, 0.03)
    lean = np.array([[width, -slant * height], [0, height]])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return [path @ (rotation @ lean).T for path in paths]


def _unsteady(path: Path2D, style: Style, rng: np.random.Generator) -> Path2D:
    """Add the hand's tremor to a path in pixels, then keep what a mouse reports of it."""
    fine = _resampled(path, 1.0)
    noise = rng.normal(0, 1, (len(fine) + 8, 2))
    # A moving average of nine: muscles sway, they do not jump. Times three restores the deviation.
    sway = np.column_stack(
        [np.convolve(noise[:, axis], np.full(9, 1 / 9), "valid") for axis in (0, 1)]
    )
    return _resampled(fine + 3 * style.tremor_px * sway, style.stride_px * rng.uniform(0.7, 1.4))


def _framed(paths: list[Path2D], pen_px: float, place: NDArray[np.float64]) -> list[Path2D]:
    """Lay a letter's middle at ``place``, or as near as the frame lets; shrink it if it must be."""
    points = np.vstack(paths)
    low, high = points.min(axis=0), points.max(axis=0)
    border = _MARGIN_PX + pen_px / 2
    room = SIDE_PX - 2 * border
    shrink = min(1.0, float(np.min(room / np.maximum(high - low, 1e-6))))
    half = shrink * (high - low) / 2
    centre = np.clip(place, border + half, SIDE_PX - border - half)
    return [centre + shrink * (path - (low + high) / 2) for path in paths]


def _ink(paths: list[Path2D], pen_px: float) -> NDArray[np.uint8]:
    """Draw paths in pixels with a round pen; shape (100, 100), grey only along the edges."""
    scale = _SUPERSAMPLING
    canvas = Image.new("L", (SIDE_PX * scale, SIDE_PX * scale), 0)
    draw = ImageDraw.Draw(canvas)
    radius = pen_px * scale / 2
    for path in paths:
        points = [(float(x), float(y)) for x, y in path * scale]
        draw.line(points, fill=255, width=round(2 * radius))
        for x, y in points:  # round ends, and round joints in between
            # Pillow paints the right and the lower bound too, hence the one less.
            draw.ellipse((x - radius, y - radius, x + radius - 1, y + radius - 1), fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.uint8)
