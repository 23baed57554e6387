"""Arguments in the text of an option: read, checked, and written back in full.

``0.2`` or ``lr=0.5,momentum=0.9``; what each is, the signature of the function says that makes the
thing: a part of a strategy, or a local rule.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a name"}


def read_arguments(
    make: Callable[..., Any], text: str, *, in_order: bool = False
) -> dict[str, Any]:
    """Return the arguments of ``make``, its defaults included, in the order of its parameters.

    Args:
        make: its parameters are annotated as float, int, bool or str, or as one of these or None;
            ``**`` takes any others. What is not annotated may be a number or a name.
        text: ``value`` of the first parameter, ``name=value``, or both, with commas between.
        in_order: any parameter's value may come without its name, in its place.

    Raises:
        ValueError: saying what is wrong with the text, and what is expected.

    Example:
        >>> def halve(times: int = 1, exactly: bool = False) -> None: ...
        >>> read_arguments(halve, "3"), read_arguments(halve, "exactly=true")
        ({'times': 3, 'exactly': False}, {'times': 1, 'exactly': True})
    """
    parameters = dict(inspect.signature(make).parameters)
    open_ended = [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    for name in open_ended:
        del parameters[name]
    given: dict[str, Any] = {}
    for place, word in enumerate(text.split(",") if text else ()):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals and place < (len(parameters) if in_order else min(1, len(parameters))):
            name, value = list(parameters)[place], name
        if name in given:
            raise ValueError(f"'{name}' is given twice")
        if name in parameters:
            given[name] = _value(name, value, parameters[name].annotation)
        elif open_ended and equals:
            given[name] = _guessed(name, value)
        else:
            raise ValueError(_unknown(name, parameters))
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in given]
    if missing:
        raise ValueError(f"'{missing[0]}' is missing: give {missing[0]}=…")
    known = {name: given.pop(name, one.default) for name, one in parameters.items()}
    return {**known, **given}


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """Return arguments as ``read_arguments`` reads them; those that are None are left out.

    >>> write_arguments({"lr": 0.5, "bias_correction": False})
    'lr=0.5,bias_correction=false'
    """
    return ",".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in arguments.items()
        if value is not None
    )


def within(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Check that an argument is finite and in a range.

    Args:
        name: how it is called.
        value: what it is.
        low: the end of the range.
        high: the other end.
        above: it has to be more than ``low``, not just as much.
        below: it has to be less than ``high``.

    Raises:
        ValueError: naming it, its value, and what is expected.
    """
    too_low = value <= low if above else value < low
    too_high = value >= high if below else value > high
    if math.isfinite(value) and not too_low and not too_high:
        return
    expected = f"{'above' if above else 'from'} {low:g}"
    if math.isfinite(high):
        expected += f"{' and below' if below else ' to'} {high:g}"
    raise ValueError(f"{name}={value:g} is out of range; a number {expected} is expected")


def nearest(name: str, known: Collection[str]) -> str:
    """Say which known name is meant, as far as can be guessed; else list them all.

    >>> nearest("momntum", ["lr", "momentum"]), nearest("x", ["lr"])
    ("did you mean 'momentum'?", 'known are lr')
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"


def _unknown(name: str, parameters: Collection[str]) -> str:
    if not parameters:
        return f"it takes no arguments, but '{name}' is given"
    return f"there is no argument '{name}'; {nearest(name, parameters)}"


def _value(name: str, value: str, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return _guessed(name, value)
    kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return _converted(name, value, kind.removesuffix(" | None"))


def _converted(name: str, value: str, annotation: str) -> Any:
    try:
        match annotation:
            case "bool":
                return _SWITCH[value.lower()]
            case "int":
                return int(value)
            case "float":
                number = float(value)
                if math.isfinite(number):
                    return number
            case _ if value:
                return value
    except (ValueError, KeyError):
        pass
    expected = _KINDS.get(annotation, annotation)
    raise ValueError(f"{name}='{value}' is not valid; {expected} is expected")


def _guessed(name: str, value: str) -> Any:
    """Read an argument whose parameter says nothing of its type."""
    for annotation in ("int", "float"):
        try:
            return _converted(name, value, annotation)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)
