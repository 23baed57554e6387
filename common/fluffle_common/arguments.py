"""Parsing and formatting of the arguments in an option, such as ``lr=0.5,momentum=0.9``.

The arguments belong to a factory function (of a strategy part or a local rule, say); its signature
defines their names, types and defaults.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_END_OF_INTEGERS = 2**63
_EXPECTED = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a name"}


def read_arguments(
    make: Callable[..., Any], text: str, *, in_order: bool = False
) -> dict[str, Any]:
    """Return the arguments of ``make``, including defaults, in the order of its parameters.

    Args:
        make: the function to call. Its parameters are annotated as float, int, bool or str, each
            optionally ``| None``; an unannotated parameter takes a number or a name, and ``**``
            takes any further names.
        text: comma-separated ``name=value`` pairs. The first parameter's value may come first
            without its name.
        in_order: whether every parameter's value may be given by position.

    Raises:
        ValueError: if the text is invalid; the message says what is expected.

    Example:
        >>> def halve(times: int = 1, exactly: bool = False) -> None: ...
        >>> read_arguments(halve, "3"), read_arguments(halve, "exactly=true")
        ({'times': 3, 'exactly': False}, {'times': 1, 'exactly': True})
    """
    parameters = dict(inspect.signature(make).parameters)
    var_keyword = [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    for name in var_keyword:
        del parameters[name]
    positional = list(parameters) if in_order else list(parameters)[:1]
    given: dict[str, Any] = {}
    for index, word in enumerate(text.split(",") if text else ()):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals and index < len(positional):
            name, value = positional[index], name
        if name in given:
            raise ValueError(f"the argument '{name}' is given twice")
        if name in parameters:
            given[name] = _convert(name, value, parameters[name].annotation)
        elif var_keyword and equals:
            given[name] = _convert(name, value, inspect.Parameter.empty)
        elif parameters:
            raise ValueError(f"unknown argument '{name}'; {nearest(name, parameters)}")
        else:
            raise ValueError(f"no arguments are accepted, but '{name}' is given")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in given]
    if missing:
        raise ValueError(f"the argument '{missing[0]}' is missing (write {missing[0]}=VALUE)")
    return {name: p.default for name, p in parameters.items()} | given


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """Format arguments in the syntax of ``read_arguments``, leaving out those that are None.

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
    """Raise ``ValueError`` unless a value is in a range; ``above``, ``below`` exclude a bound."""
    too_low = value <= low if above else value < low
    too_high = value >= high if below else value > high
    if math.isfinite(value) and not too_low and not too_high:
        return
    expected = f"{'above' if above else 'of at least'} {low:g}"
    if math.isfinite(high):
        expected += f" and {'below' if below else 'at most'} {high:g}"
    raise ValueError(f"{name}={value:g} is out of range; expected a number {expected}")


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint for an unknown name: the closest known name, or else all known names.

    >>> nearest("momntum", ["lr", "momentum"]), nearest("x", ["lr"])
    ("did you mean 'momentum'?", 'choose from lr')
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(sorted(known))}"


def _convert(name: str, value: str, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        for type_name in ("int", "float"):
            with contextlib.suppress(ValueError):
                return _convert_to(type_name, name, value)
        return {"true": True, "false": False}.get(value.lower(), value)
    type_name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return _convert_to(type_name.removesuffix(" | None"), name, value)


def _convert_to(type_name: str, name: str, value: str) -> Any:
    try:
        match type_name:
            case "bool":
                return _BOOLEANS[value.lower()]
            case "int":
                whole = int(value)
                if abs(whole) < _END_OF_INTEGERS:
                    return whole
            case "float":
                number = float(value)
                if math.isfinite(number):
                    return number
            case _ if value:
                return value
    except (ValueError, KeyError):
        pass
    expected = _EXPECTED.get(type_name, type_name)
    raise ValueError(f"{name}='{value[:60]}' is not valid; expected {expected}")
