"""Sizes, ages, rates and decoded messages as the terminal shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluffle_broker.inspect.decode import DecodedMessage, part_of
from fluffle_common.cli.printing import echo, screen, table
from fluffle_common.plural import plural
from fluffle_common.protocol.events import from_fields
from fluffle_common.tensors.table import MODEL

if TYPE_CHECKING:
    from rich.table import Table

_MOST_ROWS = 12
_WIDE = 100  # columns


def size(count: float) -> str:
    """Format a number of bytes.

    >>> size(999), size(1_361_000)
    ('999 B', '1.4 MB')
    """
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, larger
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def age(seconds: float | None) -> str:
    """Format an age; "?" if it is unknown.

    >>> age(4.2), age(200), age(7300), age(None)
    ('4 s', '3 min', '2 h', '?')
    """
    if seconds is None:
        return "?"
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def rate(per_second: float | None) -> str:
    """Format a rate; "?" if it is unknown.

    >>> rate(0.0), rate(0.4), rate(12.34)
    ('0', '0.4', '12')
    """
    if per_second is None:
        return "?"
    return f"{per_second:.1f}" if 0 < per_second < 10 else f"{per_second:.0f}"


def words(value: Any) -> str:
    """Format a value of a message, without the empty entries of mappings.

    >>> words({"config": {"lr": 0.05}, "seed": None, "classes": ["A", "B"]})
    '(config (lr 0.05), classes A B)'
    """
    match value:
        case Mapping():
            known = ((name, one) for name, one in value.items() if one not in (None, {}, [], ()))
            return f"({', '.join(f'{name} {words(one)}' for name, one in known)})"
        case list() | tuple():
            return " ".join(map(words, value))
    return str(value)


def facts(decoded: DecodedMessage) -> list[str]:
    """Return the main facts of a message as phrases, without its kind and worker."""
    fields = decoded.fields()
    if "event" in fields:
        return [from_fields(fields["event"], fields.get("fields", {})).sentence()]
    phrases = [] if decoded.round is None else [f"round {decoded.round}"]
    if "num_examples" in fields:
        phrases.append(plural(fields["num_examples"], "example"))
    if "encoding" in fields:
        phrases.append(f"encoded as {fields['encoding']}")
    if "state" in fields:
        step = f" {fields['step']}/{fields['steps']}" if fields.get("steps") else ""
        phrases.append(f"{fields['state']}{step}")
    loss = [("loss", fields["loss"])] if "loss" in fields else []
    numbers = [*loss, *fields.get("metrics", {}).items()]
    phrases += [f"{name} {value:.4g}" for name, value in numbers]
    if "events" in fields:
        kinds = Counter(one["event"] for one in fields["events"])
        phrases.append(", ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    if "reason" in fields:
        phrases.append(fields["reason"])
    part = part_of(decoded)
    if part is not None:
        phrases.append(f"part {part[0]} of {part[1] or '?'}")
    if decoded.transfer is not None:
        whole = f"{decoded.transfer.parts} parts, {size(decoded.transfer.nbytes)}"
        phrases.append(f"its tensors are sent separately, in {whole}")
    if decoded.wrong is not None:
        phrases.append(f"cannot be read: {decoded.wrong}")
    return phrases


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
