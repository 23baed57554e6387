"""Groups of options that a command takes together, and the type of options with a syntax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds these options to a command, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class Parsed(click.ParamType[Any]):
    """The type of an option that a function parses; its ``ValueError`` says what is wrong."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what ``value`` describes."""
        try:
            return self._parse(str(value).strip())
        except ValueError as why:
            self.fail(str(why), param, ctx)
