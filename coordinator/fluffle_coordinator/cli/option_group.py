"""Groups of options that a command takes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds these options to a command, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add
