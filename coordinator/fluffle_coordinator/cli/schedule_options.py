"""The options of ``fluffle coordinator`` for how rounds follow each other, and who is asked."""

from __future__ import annotations

from typing import Any

import click

from fluffle_common.cli.app import FiniteFloat, count
from fluffle_common.errors import UsageError

_OF_ROUNDS = {
    "quorum": "--quorum",
    "grace": "--grace",
    "fraction": "--fraction",
    "sample": "--sample",
    "over_provision": "--over-provision",
}


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


class SelectionType(click.ParamType[Any]):
    """The name of a rule of selection, perhaps with its settings."""

    name = "selection"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Find it."""
        from fluffle_coordinator.machine.selection import Selection
        from fluffle_coordinator.service.schedule_loading import load_selection

        if isinstance(value, Selection):
            return value
        try:
            return load_selection(str(value).strip())
        except ValueError as wrong:
            self.fail(f"{wrong}", param, ctx)


_OPTIONS = [
    click.option(
        "--fraction",
        type=FiniteFloat(0, 1, min_open=True),
        default=1.0,
        help="Part of the workers present that is asked in a round.",
    ),
    click.option(
        "--sample",
        type=count(),
        metavar="N",
        help="How many of the workers present are asked in a round, in place of --fraction.",
    ),
    click.option(
        "--over-provision",
        type=FiniteFloat(1, 100),
        default=1.0,
        metavar="P",
        help="Ask P times as many workers as --fraction or --sample says, and take the first: "
        "1.3 asks 130 % of them.",
    ),
    click.option(
        "--select",
        type=SelectionType(),
        default="uniform",
        metavar="NAME|PATH.PY:NAME",
        help="Who is asked if not all are: uniform (at random), poisson (each by a chance of its "
        "own), weighted (by examples), round-robin (by turns), or fastest:0.2 (a part of the "
        "places by turns).",
    ),
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
        type=count(0, 10_000),
        metavar="S",
        help="How many versions of the model old an update may be that still counts.  [default: 20 "
        "with 'buffered', 2 with '--late discount']",
        show_default=False,
    ),
    click.option(
        "--staleness",
        type=DiscountType(),
        metavar="NAME[:ARGS]",
        help="What part of its weight a stale update keeps: constant, polynomial:a, hinge:a,b or "
        "threshold:s.  [default: polynomial:0.5]",
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
    for name, option in _OF_ROUNDS.items():
        source = context.get_parameter_source(name)
        given = source not in (None, click.core.ParameterSource.DEFAULT)
        if given and options["schedule"] == "buffered":
            raise UsageError(
                f"{option} is for synchronous rounds, and --schedule buffered has none; "
                "--buffer says how many updates make a version, --concurrency who trains"
            )
