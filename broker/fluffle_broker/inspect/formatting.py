"""How the looking commands say things: sizes, ages, and a message in a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fluffle_broker.inspect.decode import DecodedMessage, part_of
from fluffle_common.protocol.events import from_fields


def size(count: float) -> str:
    """Return a number of bytes in words.

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
    """Return an age in words; "?" where it is not known.

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
    """Return a rate in words; "?" where it is not known.

    >>> rate(0.0), rate(0.4), rate(12.34)
    ('0', '0.4', '12')
    """
    if per_second is None:
        return "?"
    return f"{per_second:.1f}" if 0 < per_second < 10 else f"{per_second:.0f}"


def words(value: Any) -> str:
    """Return a value of a message in words; what a mapping leaves open is left out.

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


def facts(reading: DecodedMessage) -> list[str]:
    """Return what matters most of a message, but for its kind and who it is of, in words."""
    said = reading.said()
    if "event" in said:  # its sentence says all
        return [from_fields(said["event"], said.get("fields", {})).sentence()]
    told = [] if reading.round is None else [f"round {reading.round}"]
    if "num_examples" in said:
        told.append(f"{said['num_examples']} example{'' if said['num_examples'] == 1 else 's'}")
    if "encoding" in said:
        told.append(f"encoded as {said['encoding']}")
    if "state" in said:
        step = f" {said['step']}/{said['steps']}" if said.get("steps") else ""
        told.append(f"{said['state']}{step}")
    told += [f"{name} {value:.4g}" for name, value in _numbers(said)]
    if "events" in said:
        kinds = Counter(one["event"] for one in said["events"])
        told.append(", ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    if "reason" in said:
        told.append(said["reason"])
    part = part_of(reading)
    if part is not None:
        told.append(f"part {part[0]} of {part[1] or '?'}")
    if reading.transfer is not None:
        whole = f"{reading.transfer.parts} parts, {size(reading.transfer.nbytes)}"
        told.append(f"its tensors travel separately, in {whole}")
    if reading.wrong is not None:
        told.append(f"cannot be read: {reading.wrong}")
    return told


def _numbers(said: dict[str, Any]) -> list[tuple[str, float]]:
    loss = [("loss", said["loss"])] if "loss" in said else []
    return [*loss, *said.get("metrics", {}).items()]
