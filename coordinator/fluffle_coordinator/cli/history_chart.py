"""The chart of a run's history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fluffle_common.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS = 40  # a curve with more points is drawn without dots
_MOST_DRAWN = 1e300  # matplotlib computes with differences of the values, which may overflow


def history_chart(numbers: Sequence[int], columns: Mapping[str, Sequence[float | None]]) -> Figure:
    """Draw the losses after each round, and the other metrics beside them.

    Args:
        numbers: the rounds.
        columns: the values of each metric, one per round; None for a round without it.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    try:
        from fluffle_coordinator.cli.chart import Chart
    except ImportError:
        raise UsageError("charts need matplotlib; run pip install 'fluffle[plot]'") from None
    losses = [name for name in columns if name.endswith("loss")]
    others = [name for name in columns if name not in losses]
    panels = [panel for panel in (losses, others) if panel]
    figure = Chart(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in panel:
            # Without gaps: a value between two gaps would be a line of no length.
            points = [(n, v) for n, v in zip(numbers, columns[name], strict=True) if v is not None]
            rounds, values = np.array(points, float).reshape(-1, 2).T
            values = np.clip(values, -_MOST_DRAWN, _MOST_DRAWN)
            axes.plot(rounds, values, "o-" if len(rounds) <= _DOTS else "-", label=name)
        axes.set_xlabel("round")
        label = "loss" if panel is losses else panel[0] if len(panel) == 1 else "metrics"
        axes.set_ylabel(label, parse_math=False)
        axes.grid(alpha=0.3)
        for text in axes.legend(axes.lines, panel, frameon=False).get_texts():
            text.set_parse_math(False)  # the name of a metric may be any text
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure
