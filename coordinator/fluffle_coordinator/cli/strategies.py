"""``fluffle strategies``: lists the values of ``--strategy``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click

from fluffle_common.cli.printing import echo, screen, table


@click.command()
def strategies() -> None:
    """List the built-in strategies with their arguments.

    A strategy consists of parts that you join with '+': transforms of an update, at most one mean,
    and at most one server step. Without a mean, updates are averaged, weighted by their numbers of
    examples. Without a server step, the average is added to the model. Give the arguments of a part
    by name; you may leave out the name of the first argument.

    \b
      fluffle coordinator --federation letters --strategy fedadam:lr=0.03
      fluffle coordinator --federation letters --strategy clip:10+trimmed:0.2
    """
    from fluffle_coordinator.strategy.names import PARTS

    rows = table()
    for head in ("name", "kind", "what it does", "arguments and defaults"):
        rows.add_column(head, overflow="fold")
    for name, part in PARTS.items():
        rows.add_row(name, part.kind, part.about, _arguments(part.make))
    screen().print(rows)
    echo("for your own strategy, give --strategy path.py:name (docs/strategies.md)")


def _arguments(make: Callable[..., Any]) -> str:
    from fluffle_common.arguments import write_arguments

    parameters = inspect.signature(make).parameters.values()
    accepts_more = any(each.kind is each.VAR_KEYWORD for each in parameters)
    defaults = {
        each.name: "…" if each.default is each.empty else each.default
        for each in parameters
        if each.kind is not each.VAR_KEYWORD
    }
    text = write_arguments(defaults) + ",…" * accepts_more
    return text.replace(",", ", ")  # the table wraps at spaces
