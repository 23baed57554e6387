"""A run's history as a chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fluffle_common.errors import UsageError
from fluffle_common.protocol.metric_names import TEST_PREFIX
from fluffle_coordinator.observe.round_view import metrics_of
from fluffle_coordinator.storage.round_stats import mean_train_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS = 40  # a curve with more points is drawn without dots
_MOST_DRAWN = 1e300  # matplotlib computes with differences of the values, which may overflow
_PANELS_IN_ROW = 3


def history_figure(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the losses in one panel, and each other metric in one of its own, with its test.

    ``rounds`` are the rows of a history (``read_history``).

    Raises:
        UsageError: if matplotlib is not installed, or no round has a loss or a metric.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("charts need matplotlib; run pip install 'fluffle[plot]'") from None
    columns = _columns(rounds)
    if not columns:
        raise UsageError("no round of the run has a loss or a metric to draw")
    panels: dict[str, list[str]] = {}
    for name in columns:
        kind = "loss" if name.endswith("loss") else name.removeprefix(TEST_PREFIX)
        panels.setdefault(kind, []).append(name)
    height = math.ceil(len(panels) / _PANELS_IN_ROW)
    width = min(len(panels), _PANELS_IN_ROW)
    figure = Figure(figsize=(5 * width, 3.6 * height), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    numbers = [row["round"] for row in rounds]
    style = "o-" if len(numbers) <= _DOTS else "-"
    for axes, panel in zip(grid, panels.values(), strict=False):
        for name in panel:
            axes.plot(numbers, columns[name], style, label=name)
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
        for text in axes.legend(axes.lines, panel, frameon=False).get_texts():
            text.set_parse_math(False)  # the name of a metric may be any text
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _columns(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the values to draw by name, NaN for a round without this value."""
    names = dict.fromkeys(name for row in rounds for name in metrics_of(row))
    metrics = sorted(names, key=lambda name: name.startswith(TEST_PREFIX))
    values = {"train_loss": [mean_train_loss(row.get("participants", ())) for row in rounds]}
    values |= {name: [row.get(name) for row in rounds] for name in ("loss", *metrics, "epsilon")}
    return {
        name: list(map(_drawable, column))
        for name, column in values.items()
        if any(value is not None for value in column)
    }


def _drawable(value: float | None) -> float:
    return math.nan if value is None else max(-_MOST_DRAWN, min(value, _MOST_DRAWN))
