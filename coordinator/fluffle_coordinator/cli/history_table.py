"""A run's history as tables and as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluffle_common.cli.printing import aligned, text_table
from fluffle_common.protocol.events import decimal
from fluffle_coordinator.observe.round_view import metrics_of
from fluffle_coordinator.storage.round_stats import mean_train_loss

_BLUE, _RUST = "#1f5fa8", "#c1502e"
_DOTS = 40  # a curve with more points is drawn without dots
_MOST_DRAWN = 1e300  # matplotlib computes with differences of the values, which may overflow


def history_tables(rounds: list[dict[str, Any]], width: int) -> list[list[str]]:
    """Return the history with one row per round, as lines of text: one table if it fits ``width``.

    Otherwise, a short form counts participants instead of naming them and omits empty columns. If
    it is still too wide, further metrics are in tables of their own. A run with stale updates gets
    two columns more: ``updates``, because one worker can have several in a round, and ``stalest``,
    the largest staleness in versions.
    """
    columns = {
        name: aligned(name, cells, left=name == "participants")
        for name, cells in _columns(rounds).items()
    }
    full = [column for name, column in columns.items() if name != "workers"]
    if _width(full) <= width:
        return [text_table(full)]
    del columns["participants"]
    for name in ("loss", "late", "rejected"):
        if {cell.strip() for cell in columns[name][1:]} <= {"", "0"}:
            del columns[name]
    first = columns.pop("round")
    groups: list[list[list[str]]] = []
    for column in columns.values():
        if not groups or _width([*groups[-1], column]) > width:
            groups.append([first])
        groups[-1].append(column)
    return list(map(text_table, groups))


def _width(columns: list[list[str]]) -> int:
    from rich.cells import cell_len

    return cell_len(text_table(column[:1] for column in columns)[0])


def _columns(rounds: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the cells of each column, by its name."""
    metrics = sorted({name for row in rounds for name in metrics_of(row)})
    if any(row.get("epsilon") is not None for row in rounds):
        metrics.append("epsilon")
    updates = [row.get("participants", ()) for row in rounds]
    workers = [sorted({each["worker"] for each in row}) for row in updates]
    counts = {"workers": [str(len(names)) for names in workers]}
    stalest = [max((each.get("staleness", 0) for each in row), default=0) for row in updates]
    if any(stalest):
        counts = {"updates": [str(len(row)) for row in updates], "stalest": [*map(str, stalest)]}
    return {
        "round": [str(row["round"]) for row in rounds],
        "participants": list(map(", ".join, workers)),
        **counts,
        "examples": [str(sum(each["num_examples"] for each in row)) for row in updates],
        "train loss": [_number(mean_train_loss(row)) for row in updates],
        **{name: [_number(row.get(name)) for row in rounds] for name in ("loss", *metrics)},
        **{name: [str(row.get(name, "")) for row in rounds] for name in ("late", "rejected")},
    }


def draw_history(rounds: list[dict[str, Any]], out: Path) -> None:
    """Write a PNG with the accuracy (left axis) and the loss (right axis) after each round."""
    import matplotlib.pyplot as plt

    from fluffle_common.durable_files import replacing

    numbers = [row["round"] for row in rounds]
    figure, left = plt.subplots(figsize=(7, 4.2), layout="constrained")
    left.set_xlabel("round")
    left.locator_params(axis="x", integer=True)
    lines = []
    losses = left
    dot, square = ("o", "s") if len(rounds) <= _DOTS else ("", "")
    if all("accuracy" in row for row in rounds):
        percent = [100 * row["accuracy"] for row in rounds]
        lines += left.plot(numbers, percent, f"{dot}-", color=_BLUE, label="accuracy")
        left.set_ylabel("federated accuracy (%, held-out)", color=_BLUE)
        left.set_ylim(0, 100)
        left.grid(alpha=0.3)
        left.annotate(
            f"{percent[-1]:.1f} %",
            (numbers[-1], percent[-1]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            color=_BLUE,
        )
        losses = left.twinx()
    values = [max(-_MOST_DRAWN, min(row["loss"], _MOST_DRAWN)) for row in rounds]
    lines += losses.plot(numbers, values, f"{square}--", color=_RUST, label="loss")
    losses.set_ylabel("federated loss (held-out)", color=_RUST)
    if losses.dataLim.ymin >= 0:  # a log-likelihood may be negative
        losses.set_ylim(bottom=0)
    losses.legend(handles=lines, loc="lower right", frameon=False)
    run = rounds[-1].get("run", "")
    left.set_title(f"after each of {len(rounds)} rounds{f' (run {run})' if run else ''}")
    with replacing(out) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def _number(value: float | None) -> str:
    return "" if value is None else decimal(value)
