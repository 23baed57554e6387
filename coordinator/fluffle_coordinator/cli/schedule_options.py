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
        help="Fraction of the workers present that is asked in a round.",
    ),
    click.option(
        "--sample",
        type=count(),
        metavar="N",
        help="Number of workers that are asked in a round, in place of --fraction.",
    ),
    click.option(
        "--over-provision",
        type=FiniteFloat(1, 100),
        default=1.0,
        metavar="P",
        help=(
            "Ask P times as many workers as --fraction or --sample says, and count the first "
            "to answer: 1.3 asks 130 %."
        ),
    ),
    click.option(
        "--select",
        type=SelectionType(),
        default="uniform",
        metavar="NAME|PATH.PY:NAME",
        help=(
            "How the workers are selected if not all are asked: uniform (at random), poisson "
            "(each independently at random), weighted (in proportion to their examples), "
            "round-robin (in turn), or fastest:0.2 (the fastest, and 20 % of the places in "
            "turn)."
        ),
    ),
    click.option(
        "--schedule",
        default="quorum",
        metavar="quorum|buffered|PATH.PY:NAME",
        help=(
            "How rounds follow each other: synchronous rounds close at a quorum; in "
            "asynchronous ones, idle workers train the newest model at once and every "
            "--buffer updates make the next (docs/schedules.md)."
        ),
    ),
    click.option(
        "--buffer",
        type=count(),
        metavar="K",
        help="With 'buffered': number of updates that make the next model.  [default: 10]",
        show_default=False,
    ),
    click.option(
        "--concurrency",
        type=count(),
        metavar="C",
        help=(
            "With 'buffered': maximum number of workers that train at the same time.  "
            "[default: all]"
        ),
        show_default=False,
    ),
    click.option(
        "--max-staleness",
        type=count(0, 10_000),
        metavar="S",
        help=(
            "Maximum staleness of an update that still counts, in versions of the model.  "
            "[default: 20 with 'buffered', 2 with '--late discount']"
        ),
        show_default=False,
    ),
    click.option(
        "--staleness",
        type=DiscountType(),
        metavar="NAME[:ARGS]",
        help=(
            "Share of its weight that a stale update keeps: constant, polynomial:a, "
            "hinge:a,b or threshold:s.  [default: polynomial:0.5]"
        ),
        show_default=False,
    ),
    click.option(
        "--late",
        type=click.Choice(["discard", "discount"]),
        default="discard",
        help=(
            "What happens to an update that arrives after its synchronous round: it is "
            "discarded, or it counts in the open round, discounted as --staleness says."
        ),
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
                f"{option} is for synchronous rounds, and --schedule buffered has none; use "
                "--buffer and --concurrency instead"
            )
