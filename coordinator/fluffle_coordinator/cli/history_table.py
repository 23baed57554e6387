"""A run's history as tables and as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluffle_common.cli.printing import table
from fluffle_common.protocol.events import decimal

if TYPE_CHECKING:
    from rich.table import Table

from fluffle_coordinator.dashboard.snapshot import train_loss
from fluffle_coordinator.observe.round_view import RoundView, metrics_of, remembered

_BLUE, _RUST = "#1f5fa8", "#c1502e"
_DOTS = 40  # a curve with more points is drawn without dots
_MOST_DRAWN = 1e300  # matplotlib computes with differences of the values, which may overflow


def history_tables(rounds: list[dict[str, Any]], width: int) -> list[Table]:
    """Return the history with one row per round, as one table if it has at most ``width`` columns.

    The short form counts participants instead of naming them and omits empty columns. If it is
    still too wide, further metrics are in tables of their own. A run with stale updates gets two
    columns more: ``updates``, because one worker can have several in a round, and ``stalest``, the
    largest staleness in versions.
    """
    full = _table(_columns(rounds))
    if _width(full) <= width:
        return [full]
    columns = _columns(rounds, short=True)
    first, groups = {"round": columns.pop("round")}, [dict[str, list[str]]()]
    for name, cells in columns.items():
        if groups[-1] and _width(_table(first | groups[-1] | {name: cells}, edge=False)) > width:
            groups.append({})
        groups[-1][name] = cells
    return [_table(first | group, edge=False) for group in groups]


def _width(table: Table) -> int:
    from rich.console import Console

    return Console(width=10_000, markup=False, emoji=False).measure(table).maximum


def _table(columns: dict[str, list[str]], *, edge: bool = True) -> Table:
    rows = table(padding=(0, 1), pad_edge=edge)
    for name in columns:
        rows.add_column(
            name, justify="left" if name == "participants" else "right", overflow="fold"
        )
    for cells in zip(*columns.values(), strict=True):
        rows.add_row(*cells)
    return rows


def _columns(rounds: list[dict[str, Any]], *, short: bool = False) -> dict[str, list[str]]:
    """Return the cells of each column, by its name."""
    metrics = sorted({name for row in rounds for name in metrics_of(row)})
    if any(row.get("epsilon") is not None for row in rounds):
        metrics.append("epsilon")
    counts = [
        name for name in ("late", "rejected") if not short or any(row.get(name) for row in rounds)
    ]
    losses = [name for name in ("loss",) if not short or any(name in row for row in rounds)]
    views = [remembered(row) for row in rounds]
    stale = any(update.staleness for view in views for _, update in view.answers.values())
    updates = [_updates(view, short=short, stale=stale) for view in views]
    return {
        "round": [str(view.number) for view in views],
        **{name: [row[name] for row in updates] for name in (updates[0] if updates else ())},
        "examples": [str(view.num_examples or 0) for view in views],
        "train loss": [_number(train_loss(view)) for view in views],
        **{name: [_number(row.get(name)) for row in rounds] for name in (*losses, *metrics)},
        **{name: [str(row.get(name, "")) for row in rounds] for name in counts},
    }


def _updates(view: RoundView, *, short: bool, stale: bool) -> dict[str, str]:
    """Return the cells about a round's updates, by column name."""
    names = {"participants": ", ".join(sorted(view.participants))}
    if not stale:
        return {"workers": str(len(view.participants))} if short else names
    stalest = max((update.staleness or 0 for _, update in view.answers.values()), default=0)
    ages = {"updates": str(len(view.answers)), "stalest": str(stalest)}
    return ages if short else names | ages


def draw_history(rounds: list[dict[str, Any]], out: Path) -> None:
    """Write a PNG with the accuracy (left axis) and the loss (right axis) after each round."""
    import matplotlib as mpl

    mpl.use("Agg")
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
