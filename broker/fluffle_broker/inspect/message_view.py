"""A decoded message as the terminal shows it, with a table of its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluffle_broker.inspect.decode import DecodedMessage
from fluffle_broker.inspect.formatting import age, facts, size, words
from fluffle_common.cli.printing import echo, screen, table
from fluffle_common.tensors.table import MODEL

if TYPE_CHECKING:
    from rich.table import Table

_MOST_ROWS = 12
_WIDE = 100  # columns


def show_message(decoded: DecodedMessage, now: float, before: str = "") -> None:
    """Print one message in full, with its first ``_MOST_ROWS`` tensors."""
    sender = f" of {decoded.worker}" if decoded.worker else ""
    headline = ", ".join([f"{decoded.kind}{sender}", *facts(decoded)])
    echo(f"{before}{headline}")
    properties = decoded.delivery.properties
    delivery_facts = [
        size(decoded.size_bytes),
        f"{age(decoded.age_s(now))} old",
        f"user {properties.user or 'unknown'}",
        f"message_id {properties.message_id or 'none'}",
        "redelivered" if decoded.delivery.redelivered else "",
    ]
    echo("   " + ", ".join(filter(None, delivery_facts)))
    fields = decoded.fields()
    names = ("run", "seconds", "session", "task", "plan")
    rest = {name: fields[name] for name in names if name in fields}
    if rest:
        echo("   " + ", ".join(f"{key} {words(value)}" for key, value in rest.items()))
    if decoded.header("reason") is not None:
        cause = decoded.header("cause") or "unknown"
        echo(f"   rejected ({cause}): {decoded.header('reason')}")
    if decoded.message is None:
        echo(f"   begins with {decoded.first_bytes.hex(' ')}")
    if decoded.tensors:
        screen().print(_tensors(decoded, wide=screen().width >= _WIDE))


def _tensors(decoded: DecodedMessage, *, wide: bool) -> Table:
    """Return a table of tensors; only a wide terminal has room for min, mean and max."""
    shown = decoded.tensors[:_MOST_ROWS]
    left = len(decoded.tensors) - len(shown)
    more = f"   … and {left} more tensors; --json shows all tensors" if left else None
    rows = table(caption=more, pad_edge=False, padding=(0, 1))
    rows.add_column("   tensor", overflow="fold", min_width=12)
    values = ("norm", "min", "mean", "max") if wide else ("norm",)
    for name in ("dtype", "shape", *values, "NaN", "inf"):
        rows.add_column(name, justify="right", no_wrap=True)
    for tensor in shown:
        numbers = [getattr(tensor, name) for name in values]
        rows.add_row(
            f"   {tensor.name}" + f" ({tensor.group})" * (tensor.group != MODEL),
            tensor.dtype,
            "x".join(map(str, tensor.shape)) or "scalar",
            *("-" if number is None else f"{number:.4g}" for number in numbers),
            *("-" if count is None else str(count) for count in (tensor.nan, tensor.inf)),
        )
    return rows
