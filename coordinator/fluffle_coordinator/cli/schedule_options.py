"""The options of ``fluffle coordinator`` for its schedule and for selecting workers."""

from __future__ import annotations

from typing import Any

import click

from fluffle_common.cli.app import FiniteFloat, count
from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.option_group import Parsed, option_group
from fluffle_coordinator.machine.rules import Rules
from fluffle_coordinator.machine.selection import Selection
from fluffle_coordinator.machine.staleness import Discount

SYNCHRONOUS_ONLY = ("quorum", "grace", "fraction", "sample", "over_provision")
"""The options that ``--schedule buffered`` would ignore, and that are therefore refused."""


def _selection(text: str) -> Selection:
    from fluffle_coordinator.user_code.schedule_loading import load_selection

    return load_selection(text)


schedule_options = option_group(
    click.option(
        "--fraction",
        type=FiniteFloat(0, 1, min_open=True),
        default=Rules.fraction,
        help="Fraction of the connected workers to select in each round.",
    ),
    click.option(
        "--sample",
        type=count(),
        metavar="N",
        help="Number of workers to select in each round, instead of --fraction.",
    ),
    click.option(
        "--over-provision",
        type=FiniteFloat(1, 100),
        default=Rules.over_provision,
        metavar="P",
        help="Over-selection factor: with 1.3, a round selects 30 % more workers than --fraction "
        "or --sample asks for, so that it does not have to wait for stragglers. A --quorum of "
        "'all' or a fraction does not count these extra workers.",
    ),
    click.option(
        "--select",
        type=Parsed("selection", _selection),
        default="uniform",
        metavar="NAME|PATH.PY:NAME",
        help="Rule that selects workers: uniform (at random); poisson (each worker independently "
        "at random); weighted (at random, in proportion to examples); round-robin (in turn); "
        "fastest:0.2 (the fastest workers, but 20 % of the places go to workers of any speed, "
        "in turn); or path.py:name (your own function).",
    ),
    click.option(
        "--schedule",
        default="quorum",
        metavar="quorum|buffered|PATH.PY:NAME",
        help="Rule that decides when to make the next model (docs/schedules.md). With 'quorum', "
        "training proceeds in synchronous rounds; a round closes when its quorum is reached. With "
        "'buffered', training is asynchronous: every K updates (--buffer K) make a new model, and "
        "an idle worker trains the newest model at once.",
    ),
    click.option(
        "--buffer",
        type=count(),
        metavar="K",
        help="Number of updates that make one new model, with --schedule buffered.  [default: 10]",
    ),
    click.option(
        "--concurrency",
        type=count(),
        metavar="C",
        help="Maximum number of workers that train at the same time, with --schedule buffered.  "
        "[default: all workers]",
    ),
    click.option(
        "--max-staleness",
        type=count(0, 10_000),
        metavar="S",
        help="Maximum staleness of an update; staler updates are discarded. An update that was "
        "trained from version 5 has a staleness of 2 when version 7 is the newest.  [default: 20 "
        "with '--schedule buffered', 2 with '--late discount']",
    ),
    click.option(
        "--staleness",
        type=Parsed("staleness", Discount.parse),
        metavar="NAME[:ARGS]",
        help="Factor that multiplies the weight of an update with staleness s: constant (1); "
        "polynomial:a (1/(1+s)^a); hinge:a,b (1 up to s=b, then 1/(a(s-b)+1)); or threshold:b (1 "
        "up to s=b, then 0).  [default: polynomial:0.5]",
    ),
    click.option(
        "--late",
        type=click.Choice(["discard", "discount"]),
        default="discard",
        help="Treatment of an update that arrives after its synchronous round has closed: "
        "'discard' ignores the update; 'discount' adds the update to the open round, with a weight "
        "reduced by --staleness.",
    ),
)


def check_schedule_options(options: dict[str, Any]) -> None:
    """Refuse (``UsageError``) options of this command that ``--schedule buffered`` would ignore."""
    if options["schedule"] != "buffered":
        return
    context = click.get_current_context()
    for name in SYNCHRONOUS_ONLY:
        source = context.get_parameter_source(name)
        if source not in (None, click.core.ParameterSource.DEFAULT):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with --schedule buffered, which has no "
                "synchronous rounds; use --buffer and --concurrency instead"
            )
