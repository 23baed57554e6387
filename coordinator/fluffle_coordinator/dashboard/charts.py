"""Charts as inline SVG: text in, text out; colours are CSS variables of the page around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 30
_DOTS_UP_TO = 60  # points; a longer line is a line only
_LABELS = 12  # rounds that are named below a chart


@dataclass(frozen=True)
class Series:
    """One line: a value for each x, None where there is none; ``colour`` is a CSS variable."""

    name: str
    colour: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Frame:
    """The plane of a chart: ``width`` x ``height`` user units, values from ``bottom`` up."""

    width: int
    height: int
    top: float
    bottom: float = 0.0

    @property
    def inner(self) -> int:
        """The width between the axes' ends."""
        return self.width - _LEFT - _RIGHT

    def y(self, value: float) -> float:
        """Return where a value lies, from the top."""
        part = (value - self.bottom) / (self.top - self.bottom)
        return round(self.height - _BOTTOM - part * (self.height - _TOP - _BOTTOM), 2)


def ticks(top: float, bottom: float = 0.0, about: int = 5) -> list[float]:
    """Return round numbers from ``bottom`` to the first that is not below ``top``.

    >>> ticks(0.87), ticks(23)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 5.0, 10.0, 15.0, 20.0, 25.0])
    """
    span = top - bottom
    if not 0 < span < math.inf:
        return [bottom, bottom + 1.0]
    rough = span / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first = math.floor(bottom / step + 1e-9)
    last = math.ceil(top / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def line_chart(
    title: str,
    numbers: Sequence[int],
    series: Sequence[Series],
    show: Callable[[float], str],
    limits: tuple[float, float] | None = None,
) -> str:
    """Draw one or more lines over the rounds.

    Args:
        title: what it shows, for those who cannot see it.
        numbers: the rounds.
        series: the lines.
        show: how a value is written.
        limits: the ends of the axis; None: from 0, or the least value below it, to the largest.
    """
    there = [value for one in series for value in one.values if value is not None]
    low, high = limits or (min([0.0, *there]), max(there, default=1.0))
    marks = ticks(high, low)
    frame = Frame(520, 270, marks[-1], marks[0])
    step = frame.inner / max(1, len(numbers) - 1)
    xs = [
        round(_LEFT + (step * i if len(numbers) > 1 else frame.inner / 2), 2)
        for i in range(len(numbers))
    ]
    drawn = [_axes(frame, marks, show), _rounds(frame, numbers, xs)]
    for one in series:
        drawn.append(f'<path d="{_path(frame, xs, one.values)}" class="line {one.colour}"/>')
        points = [
            (x, n, v) for x, n, v in zip(xs, numbers, one.values, strict=True) if v is not None
        ]
        if len(points) > _DOTS_UP_TO:
            points = points[-1:]
        drawn += [
            f'<circle cx="{x}" cy="{frame.y(value)}" r="3.4" class="dot {one.colour}">'
            f"<title>round {number}: {escape(one.name)} {escape(show(value))}</title></circle>"
            for x, number, value in points
        ]
    return _svg(title, frame.width, frame.height, drawn)


def stacked_bars(
    title: str,
    numbers: Sequence[int],
    stacks: Sequence[Mapping[str, float] | None],
    colours: Mapping[str, str],
    show: Callable[[float], str],
    *,
    height: int = 270,
) -> str:
    """Draw one bar a round, its parts one above the other in the order of ``colours``."""
    highest = max((sum(one.values()) for one in stacks if one), default=0.0)
    marks = ticks(highest, about=max(2, height // 60))
    frame = Frame(1060, height, marks[-1])
    pitch = frame.inner / max(1, len(numbers))
    wide = min(54.0, pitch * 0.72)
    xs = [round(_LEFT + pitch * (i + 0.5), 2) for i in range(len(numbers))]
    drawn = [_axes(frame, marks, show), _rounds(frame, numbers, xs)]
    for x, number, stack in zip(xs, numbers, stacks, strict=True):
        below = 0.0
        for name, colour in colours.items():
            value = (stack or {}).get(name, 0.0)
            top, foot = frame.y(below + value), frame.y(below)
            below += value
            if foot > top:
                drawn.append(
                    f'<rect x="{x - wide / 2:.2f}" y="{top}" width="{wide:.2f}" '
                    f'height="{foot - top:.2f}" class="part {colour}">'
                    f"<title>round {number}: {escape(name)} {escape(show(value))}</title></rect>"
                )
    return _svg(title, frame.width, frame.height, drawn)


@dataclass(frozen=True)
class Square:
    """One cell of a matrix.

    Args:
        kind: its CSS class.
        text: what is written in it where there is room.
        told: what it says when pointed at.
        strength: how strongly it is filled, 0 to 1.
    """

    kind: str
    text: str
    told: str
    strength: float = 1.0


def matrix(
    title: str,
    numbers: Sequence[int],
    rows: Sequence[tuple[str, Sequence[Square], str]],
) -> str:
    """Draw a row for each name, a column for each round, and a few words at the end of a row."""
    names = [name if len(name) <= 26 else f"{name[:25]}…" for name, _, _ in rows]
    left = 14 + 7.4 * max(map(len, names), default=0)
    right = 14 + 6.6 * max((len(words) for _, _, words in rows), default=0)
    width, high = 1060, 30
    pitch = min(64.0, (width - left - right) / max(1, len(numbers)))
    gap = 3.0 if pitch > 14 else pitch * 0.15
    xs = [round(left + pitch * (i + 0.5), 2) for i in range(len(numbers))]
    height = 26 + high * len(rows)
    drawn = []
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = 2 + high * place
        middle = y + high / 2 + 4
        drawn.append(
            f'<text x="{left - 10:.1f}" y="{middle}" class="name" text-anchor="end">{escape(name)}'
            f"<title>{escape(row[0])}</title></text>"
        )
        for x, square in zip(xs, row[1], strict=True):
            drawn.append(
                f'<rect x="{x - pitch / 2 + gap / 2:.2f}" y="{y + 1.5}" '
                f'width="{pitch - gap:.2f}" height="{high - 3}" rx="{min(4.0, pitch / 5):.1f}" '
                f'class="cell {square.kind}" style="--strength:{square.strength:.2f}">'
                f"<title>{escape(square.told)}</title></rect>"
            )
            if square.text and len(square.text) * 7 < pitch - gap:
                drawn.append(
                    f'<text x="{x}" y="{middle}" class="in" text-anchor="middle">'
                    f"{escape(square.text)}</text>"
                )
        end = left + pitch * len(numbers) + 10
        drawn.append(f'<text x="{end:.1f}" y="{middle}" class="tick">{escape(row[2])}</text>')
    drawn.append(_round_names(numbers, xs, height - 6))
    return _svg(title, width, height, drawn)


def _axes(frame: Frame, marks: Sequence[float], show: Callable[[float], str]) -> str:
    return "".join(
        f'<line x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{frame.y(mark)}" y2="{frame.y(mark)}" '
        f'class="{"axis" if mark == 0 else "grid"}"/>'
        f'<text x="{_LEFT - 7}" y="{frame.y(mark) + 4}" class="tick" text-anchor="end">'
        f"{escape(show(mark))}</text>"
        for mark in marks
    )


def _rounds(frame: Frame, numbers: Sequence[int], xs: Sequence[float]) -> str:
    return _round_names(numbers, xs, frame.height - 10)


def _round_names(numbers: Sequence[int], xs: Sequence[float], y: float) -> str:
    every = max(1, -(-len(numbers) // _LABELS))
    return "".join(
        f'<text x="{x}" y="{y}" class="tick" text-anchor="middle">{number}</text>'
        for place, (number, x) in enumerate(zip(numbers, xs, strict=True))
        if place % every == 0
    )


def _path(frame: Frame, xs: Sequence[float], values: Sequence[float | None]) -> str:
    """Return the path through the values; it is broken where there is none."""
    steps, pen = [], "M"
    for x, value in zip(xs, values, strict=True):
        if value is None:
            pen = "M"
        else:
            steps.append(f"{pen}{x} {frame.y(value)}")
            pen = "L"
    return " ".join(steps)


def _svg(title: str, width: int, height: int, drawn: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(drawn)}</svg>"
    )
