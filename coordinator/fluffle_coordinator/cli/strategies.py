"""``fluffle strategies``: what ``--strategy`` may name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click

from fluffle_common.cli.printing import echo, screen, table


@click.command()
def strategies() -> None:
    """List the strategies that have a name, with their arguments.

    A strategy is put together from parts with '+' between: transforms of an update, one mean, and
    one server step. What is left out is as in fedavg: the mean by numbers of examples, added to
    the model. An argument is given by its name; that of the first may be left out.

    \b
      fluffle coordinator --federation letters --strategy fedadam:lr=0.03
      fluffle coordinator --federation letters --strategy clip:10+trimmed:0.2
    """
    from fluffle_coordinator.strategy.names import PARTS

    rows = table()
    for head in ("name", "is a", "what it does", "arguments, by default"):
        rows.add_column(head, overflow="fold")
    for name, part in PARTS.items():
        rows.add_row(name, part.kind, part.about, _arguments(part.make))
    screen(width_in_a_pipe=140).print(rows)
    echo("or path.py:name, an object in your own file: docs/strategies.md")


def _arguments(make: Callable[..., Any]) -> str:
    from fluffle_common.arguments import write_arguments

    parameters = inspect.signature(make).parameters.values()
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters)
    known = {
        one.name: "…" if one.default is one.empty else one.default
        for one in parameters
        if one.kind is not one.VAR_KEYWORD
    }
    return (write_arguments(known) + ",…" * open_ended).replace(",", ", ")  # so that it wraps
