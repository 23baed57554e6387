"""The chart of a run's history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fluffle_common.cli.output_files import new_figure
from fluffle_common.errors import UsageError
from fluffle_coordinator.observe.round_view import metrics_of
from fluffle_coordinator.storage.round_stats import mean_train_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS = 40  # a curve with more points is drawn without dots
_MOST_DRAWN = 1e300  # matplotlib computes with differences of the values, which may overflow


def history_chart(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the losses after each round of a ``read_history``, and the other metrics beside them.

    Raises:
        UsageError: if matplotlib is not installed, or no round has a metric.
    """
    measured = [(row["round"], _values(row)) for row in rounds]
    names = dict.fromkeys(name for _, values in measured for name in values)
    if not names:
        raise UsageError("no round has a loss or a metric to draw; no task has reported one yet")
    losses = [name for name in names if name.endswith("loss")]
    others = [name for name in names if name not in losses]
    panels = [panel for panel in (losses, others) if panel]
    figure = new_figure(5 * len(panels), 3.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in panel:
            # Without gaps: a value between two gaps would be a line of no length.
            points = [(number, values[name]) for number, values in measured if name in values]
            x, y = np.array(points, float).T
            y = np.clip(y, -_MOST_DRAWN, _MOST_DRAWN)
            axes.plot(x, y, "o-" if len(x) <= _DOTS else "-", label=name)
        axes.set_xlabel("round")
        label = "loss" if panel is losses else panel[0] if len(panel) == 1 else "metrics"
        axes.set_ylabel(label, parse_math=False)
        axes.grid(alpha=0.3)
        for text in axes.legend(axes.lines, panel, frameon=False).get_texts():
            text.set_parse_math(False)  # the name of a metric may be any text
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    values = {
        "train_loss": mean_train_loss(row.get("participants", ())),
        "loss": row.get("loss"),
        **dict(sorted(metrics_of(row).items())),
        "epsilon": row.get("epsilon"),
    }
    return {name: value for name, value in values.items() if value is not None}
