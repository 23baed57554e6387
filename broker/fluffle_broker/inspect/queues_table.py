"""The table and the hints that ``fluffle queues`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from fluffle_broker.inspect.formatting import age, rate, size
from fluffle_common.cli.printing import printable, table
from fluffle_common.plural import listed

if TYPE_CHECKING:
    from rich.table import Table

    from fluffle_broker.inspect.queues import QueueOverview
    from fluffle_common.transport.rabbitmq.management import QueueFigures

Number = TypeVar("Number", int, float)
# Up to this number, quiet queues of one kind each get a row.
_MAX_QUIET_ROWS = 3
_OF_WORKERS = ("inbox", "outbox", "lock", "lock2", "tap")
_FIGURES = ("ready", "unacked", "consumers", "bytes", "in/s", "out/s", "oldest")
# A narrower terminal has no room for the purpose of a queue, or for more than the first figures.
_WIDE, _NARROW = 150, 70
_UNREPORTED = "-"


def build_table(overview: QueueOverview, width: int) -> Table:
    """Return the figures as a table that fits ``width`` columns."""
    wide = width >= _WIDE
    rows = table(collapse_padding=True, pad_edge=False, expand=wide)
    rows.add_column("queue", overflow="fold", min_width=10)
    figures = _FIGURES if width >= _NARROW else _FIGURES[:3]
    for name in figures:
        rows.add_column(name, justify="right", no_wrap=True)
    if wide:
        rows.add_column("purpose", style="dim", no_wrap=True, overflow="ellipsis", ratio=1)
    for queue in group_quiet(overview):
        unknown = _UNREPORTED if queue.type == "stream" else "?"
        cells = (
            queue.name,
            f"{queue.ready:,}",
            "?" if queue.unacknowledged is None else f"{queue.unacknowledged:,}",
            f"{queue.consumers:,}",
            unknown if queue.size_bytes is None else size(queue.size_bytes),
            rate(queue.in_rate),
            rate(queue.out_rate),
            (unknown if queue.oldest_s is None else age(queue.oldest_s)) if queue.ready else "",
        )
        rows.add_row(*cells[: 1 + len(figures)], *([queue.purpose] if wide else []))
    return rows


def legend(overview: QueueOverview) -> list[str]:
    """Return a line for each sign that stands for a figure."""
    lines, read = [], overview.queues
    if any(one.size_bytes is None and one.type == "stream" for one in read):
        lines.append(f"{_UNREPORTED}  RabbitMQ does not report this figure for a stream")
    if any(
        one.in_rate is None or (one.size_bytes is None and one.type != "stream") for one in read
    ):
        lines.append("?  unknown, because RabbitMQ has not reported this figure")
    return lines


def group_quiet(overview: QueueOverview) -> list[QueueFigures]:
    """Return the rows to show: short names, and many quiet queues of a kind as one."""
    shown: list[QueueFigures] = []
    quiet: dict[str, list[QueueFigures]] = {kind: [] for kind in _OF_WORKERS}
    for queue in overview.queues:
        short = replace(queue, name=overview.short_name(queue))
        kind = short.name.partition(".")[0]
        is_quiet = not queue.ready and not queue.unacknowledged and queue.known
        (quiet[kind] if is_quiet and kind in quiet else shown).append(short)
    for kind, queues in quiet.items():
        shown += queues if len(queues) <= _MAX_QUIET_ROWS else [_combined(kind, queues)]
    return shown


def _combined(kind: str, queues: Sequence[QueueFigures]) -> QueueFigures:
    return replace(
        queues[0],
        name=f"{kind}.* ({len(queues)} empty)",
        consumers=sum(queue.consumers for queue in queues),
        size_bytes=_sum(queue.size_bytes for queue in queues),
        in_rate=_sum(queue.in_rate for queue in queues),
        out_rate=_sum(queue.out_rate for queue in queues),
        purpose=f"all empty {kind} queues",
    )


def _sum(numbers: Iterable[Number | None]) -> Number | None:
    """Return the sum of the known numbers; None if none is known."""
    known = [number for number in numbers if number is not None]
    return sum(known[1:], known[0]) if known else None


def hints(overview: QueueOverview) -> list[str]:
    """Return one line for each problem; all absent workers share a line."""
    lines: list[str] = []
    absent: list[str] = []
    for queue in overview.queues:
        hint = overview.hint(queue)
        name = overview.short_name(queue)
        worker = name.removeprefix("inbox.")
        if hint == f"worker {worker} is not connected":
            absent.append(worker)
        elif hint is not None:
            lines.append(printable(f"{name}: {hint}"))
    if absent:
        lines.append(printable(_not_connected(absent)))
    if unbounded := [
        overview.short_name(queue) for queue in overview.queues if queue.limited is False
    ]:
        lines.append(printable(_unbounded(unbounded, overview.topology.federation)))
    return lines


def _unbounded(names: Sequence[str], federation: str) -> str:
    which = f"queue {names[0]}" if len(names) == 1 else f"these {len(names)} queues"
    which_ones = "" if len(names) == 1 else f" ({listed(names)})"
    return (
        f"no policy limits how much {which} may hold{which_ones}; set limits with "
        f"'fluffle broker apply-policy --federation {federation}'"
    )


def _not_connected(workers: Sequence[str]) -> str:
    if len(workers) == 1:
        return f"worker {workers[0]} is not connected"
    return f"{len(workers)} workers are not connected: {listed(workers)}"
