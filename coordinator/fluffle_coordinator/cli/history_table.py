"""A run's history as tables."""

from __future__ import annotations

from typing import Any

from fluffle_common.cli.printing import aligned, text_table
from fluffle_common.protocol.events import decimal
from fluffle_coordinator.observe.round_view import metrics_of
from fluffle_coordinator.storage.round_stats import mean_train_loss


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


def _number(value: float | None) -> str:
    return "" if value is None else decimal(value)
