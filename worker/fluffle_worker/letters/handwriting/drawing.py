"""Draws letters A to J in the handwriting of different, invented people.

Each client is one writer with a ``Style``: preferred constructions of each letter, a preferred pen,
a slant, a size, a place on the page, and a more or less steady hand. Each image is one attempt of
that writer, and no two attempts are alike::

    allograph ──> knots moved ──> pen's path ──> size, slant, turn ──> hand and mouse ──> pixels
    (strokes.py)  (_attempt)      (_trace)       (_posed)              (_unsteady)        (_ink)

All randomness comes from generators seeded with ``(seed, writer)``. Equal seeds draw equal bytes,
and a client's letters do not depend on the number of clients.
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
"""Pen widths of a drawing program: fine, medium, broad."""

# Mean horizontal offset of each letter from the middle of the page, as observed in people who drew
# one letter after another.
_OFFSETS_PX = dict(
    zip(LETTERS, (-1.5, 1.0, -3.5, 1.5, 3.0, 6.0, -1.0, -2.0, 2.5, -0.5), strict=True)
)

_SCATTER_PX = (7.5, 4.0)  # standard deviation of a letter's place between attempts, (x, y)
_MARGIN_PX = 1.5  # black left at every edge, so that no letter is cut off
_SUPERSAMPLING = 4  # drawn larger by this factor, then averaged, for grey edges
_CURVE_STEPS = 12  # points per knot of a curve

Path2D: TypeAlias = NDArray[np.float64]
"""A pen's path, shape (points, 2), columns x and y."""


@dataclass(frozen=True, slots=True)
class Style:
    """One person's handwriting. Lengths are shares of the letter's height, or pixels (``_px``)."""

    allographs: Mapping[str, tuple[float, ...]]  # the probabilities of each letter's allographs
    pens: tuple[float, ...]  # the probabilities of ``PENS_PX``
    habit: int  # the seed of this person's lasting deviation from each allograph
    height_px: float  # of a plain capital
    width: float  # the stretch of the x axis, relative to ``strokes.py``
    slant: float  # the shift to the right per unit of height; positive leans forward
    turn: float  # the clockwise rotation of the letter, in radians
    centre_px: tuple[float, float]  # of the letter, ``(x, y)``
    wobble: float  # the standard deviation of a knot's place between attempts
    tremor_px: float  # the standard deviation of the hand from its path
    stride_px: float  # between two positions that the mouse reports
    rounding: float  # the length over which sharp corners are smoothed
    overshoot: float  # of strokes beyond their ends; negative if they stop short


def writer_style(rng: np.random.Generator, favourite_pen: int) -> Style:
    """Return the style of a random person, who mostly uses the pen ``PENS_PX[favourite_pen]``."""
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
    """Draw one attempt of a person at one of ``LETTERS``.

    Returns:
        The image, uint8, shape [100, 100]: strokes of 255 on 0 with grey edges, all of them inside
        the frame.
    """
    shapes = ALLOGRAPHS[letter]
    chosen = int(rng.choice(len(shapes), p=style.allographs[letter]))
    # A separate generator, so that the lasting deviation is the same in every attempt.
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
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Draw a data set: ``out/client-<N>/<letter>/<nnnn>.png``, 8-bit grey, ``N`` from 1.

    The writers' folders appear once all letters are drawn; after a failure, there are none.

    Args:
        out: the folder to fill; created with its parents if it does not exist.
        clients: the number of clients.
        per_client: the number of images per writer, at least one of each letter.
        unseen: the number of additional writers, in ``out/writer-<N>``; ``N`` continues the count.
        seed: equal seeds draw equal bytes.
        progress: called after each image.

    Raises:
        UsageError: if ``out`` is not an empty folder.
        OSError: if the folder cannot be written.
    """
    # Inside `out`, which may be a mount point, so that renaming stays on one file system.
    unfinished = out / ".unfinished"
    if out.exists() and not (out.is_dir() and set(out.iterdir()) <= {unfinished}):
        raise UsageError(
            f"{out} is not an empty folder; choose a new folder, or remove {out} first"
        )

    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed run
    unfinished.mkdir(parents=True)
    try:
        for writer in range(1, clients + unseen + 1):
            owner = f"client-{writer}" if writer <= clients else f"writer-{writer}"
            for name, image in _letters_of(writer, per_client, seed):
                path = unfinished / owner / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
                progress()
        for folder in sorted(unfinished.iterdir()):
            folder.rename(out / folder.name)
    finally:
        shutil.rmtree(unfinished)


def _letters_of(writer: int, per_client: int, seed: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the path, relative to the writer's folder, and the image of each letter."""
    rng = np.random.default_rng([seed, writer])
    # Favourite pens rotate, so that even three writers differ visibly.
    style = writer_style(rng, favourite_pen=writer % len(PENS_PX))
    for letter, count in zip(LETTERS, _class_counts(per_client, rng), strict=True):
        for number in range(count):
            yield f"{letter}/{number:04d}.png", draw_letter(letter, style, rng)


def _class_counts(total: int, rng: np.random.Generator) -> list[int]:
    """Split ``total`` at random into a count per letter, each at least 1."""
    shares = rng.dirichlet(np.full(len(LETTERS), 50.0))
    spare = total - len(LETTERS)
    ends = np.rint(np.cumsum(shares) * spare).astype(int)
    ends[-1] = spare
    return [1 + int(count) for count in np.diff(ends, prepend=0)]


def _preferences(shapes: tuple[Allograph, ...], rng: np.random.Generator) -> tuple[float, ...]:
    """Draw a person's probabilities of a letter's allographs, with a few favourites."""
    common = np.array([shape.share for shape in shapes], dtype=np.float64)
    common /= common.sum()
    own = rng.dirichlet(2.0 * common)
    return tuple((0.65 * own + 0.35 * common).tolist())


def _attempt(
    stroke: Stroke, style: Style, habit: np.random.Generator, rng: np.random.Generator
) -> Path2D:
    """Return the pen's path through a stroke's displaced knots, in units of the letter's height."""
    knots = np.array(stroke.knots) / 100
    knots += habit.normal(0, 0.02, knots.shape) + rng.normal(0, style.wobble, knots.shape)
    path = _trace(knots, stroke.corners)
    return _extended(_rounded(path, style.rounding), style.overshoot, rng)


def _trace(knots: Path2D, corners: tuple[int, ...]) -> Path2D:
    """Return a path that passes smoothly through the knots and turns sharply at ``corners``.

    Between two corners it is a Catmull-Rom spline, which needs no control points besides the knots.
    """
    pieces = [knots[:1]]
    for first, last in pairwise(corners):
        run = knots[first : last + 1]
        # Mirror the outer knots, because each piece needs a neighbour on both sides.
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
    """Smooth a path's corners over about ``length``; its ends stay in place."""
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
    """Return points along a path, about ``step`` apart and including both ends."""
    lengths = np.hypot(*np.diff(path, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    places = np.linspace(0, along[-1], max(2, round(along[-1] / step) + 1))
    return np.column_stack([np.interp(places, along, path[:, axis]) for axis in (0, 1)])


def _posed(paths: list[Path2D], style: Style, rng: np.random.Generator) -> list[Path2D]:
    """Scale, slant and turn all strokes of a letter; the result is in pixels."""
    height = style.height_px * np.exp(rng.normal(0, 0.07))
    width = height * style.width * np.exp(rng.normal(0, 0.1))
    slant = style.slant + rng.normal(0, 0.05)
    turn = style.turn + rng.normal(0, 0.03)
    lean = np.array([[width, -slant * height], [0, height]])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return [path @ (rotation @ lean).T for path in paths]


def _unsteady(path: Path2D, style: Style, rng: np.random.Generator) -> Path2D:
    """Add the hand's tremor to a path in pixels, then sample it as a mouse does."""
    fine = _resampled(path, 1.0)
    noise = rng.normal(0, 1, (len(fine) + 8, 2))
    # A moving average over nine points makes the noise sway; a factor of 3 restores its deviation.
    sway = np.column_stack(
        [np.convolve(noise[:, axis], np.full(9, 1 / 9), "valid") for axis in (0, 1)]
    )
    return _resampled(fine + 3 * style.tremor_px * sway, style.stride_px * rng.uniform(0.7, 1.4))


def _framed(paths: list[Path2D], pen_px: float, place: NDArray[np.float64]) -> list[Path2D]:
    """Centre a letter as near to ``place`` as fits into the frame, shrinking it if necessary."""
    points = np.vstack(paths)
    low, high = points.min(axis=0), points.max(axis=0)
    border = _MARGIN_PX + pen_px / 2
    room = SIDE_PX - 2 * border
    shrink = min(1.0, float(np.min(room / np.maximum(high - low, 1e-6))))
    half = shrink * (high - low) / 2
    centre = np.clip(place, border + half, SIDE_PX - border - half)
    return [centre + shrink * (path - (low + high) / 2) for path in paths]


def _ink(paths: list[Path2D], pen_px: float) -> NDArray[np.uint8]:
    """Draw paths with a round pen; return uint8 pixels, shape [100, 100], with grey edges."""
    scale = _SUPERSAMPLING
    canvas = Image.new("L", (SIDE_PX * scale, SIDE_PX * scale), 0)
    draw = ImageDraw.Draw(canvas)
    radius = pen_px * scale / 2
    for path in paths:
        points = [(float(x), float(y)) for x, y in path * scale]
        draw.line(points, fill=255, width=round(2 * radius))
        for x, y in points:  # round ends and joints
            # Pillow's bounds are inclusive on the right and at the bottom, hence - 1.
            draw.ellipse((x - radius, y - radius, x + radius - 1, y + radius - 1), fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.uint8)
