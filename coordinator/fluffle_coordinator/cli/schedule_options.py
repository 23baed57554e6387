"""The options of ``fluffle coordinator`` that say how rounds follow each other."""

from __future__ import annotations

from typing import Any

import click

from fluffle_common.cli.app import count
from fluffle_common.errors import UsageError

_OF_ROUNDS = ("quorum", "grace", "fraction")


class DiscountType(click.ParamType[Any]):
    """``constant``, ``polynomial[:a]``, ``hinge[:a,b]`` or ``threshold[:s]``."""

    name = "staleness"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse it."""
        from fluffle_coordinator.machine.staleness import Discount

        if isinstance(value, Discount):
            return value
        try:
            return Discount.parse(str(value).strip())
        except ValueError as wrong:
            self.fail(f"{wrong}", param, ctx)


_OPTIONS = [
    click.option(
        "--schedule",
        default="quorum",
        metavar="quorum|buffered|PATH.PY:NAME",
        help="How rounds follow each other: synchronous rounds that close at a quorum; or "
        "asynchronous ones, where idle workers train the newest model at once and every --buffer "
        "updates make the next (docs/schedules.md).",
    ),
    click.option(
        "--buffer",
        type=count(),
        metavar="K",
        help="With 'buffered': how many updates make the next model.  [default: 10]",
        show_default=False,
    ),
    click.option(
        "--concurrency",
        type=count(),
        metavar="C",
        help="With 'buffered': how many workers train at a time at most.  [default: all]",
        show_default=False,
    ),
    click.option(
        "--max-staleness",
        type=click.IntRange(0, 10_000),
        metavar="S",
        help="How many versions of the model old an update may be that still counts.  [default: 20 "
        "with 'buffered', 2 with '--late discount']",
        show_default=False,
    ),
    click.option(
        "--staleness",
        type=DiscountType(),
        metavar="constant|polynomial[:a]|hinge[:a,b]|threshold[:s]",
        help="What part of its weight a stale update keeps.  [default: polynomial:0.5]",
        show_default=False,
    ),
    click.option(
        "--late",
        type=click.Choice(["discard", "discount"]),
        default="discard",
        help="What becomes of an update that comes after its synchronous round: nothing, or it "
        "counts in the open round, discounted as --staleness says.",
    ),
]


def schedule_options(command: Any) -> Any:
    """Add them to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_schedule_options(options: dict[str, Any]) -> None:
    """Refuse options of synchronous rounds for asynchronous ones.

    Raises:
        UsageError: naming the first.
    """
    context = click.get_current_context()
    for name in _OF_ROUNDS:
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and options["schedule"] == "buffered":
            raise UsageError(
                f"--{name} is for synchronous rounds, and --schedule buffered has none; "
                "--buffer says how many updates make a version, --concurrency who trains"
            )
