"""The options of ``fluffle coordinator`` that end a run early."""

from __future__ import annotations

import click

from fluffle_common.cli.app import FiniteFloat, count, seconds
from fluffle_coordinator.cli.option_group import option_group

stopping_options = option_group(
    click.option(
        "--monitor",
        metavar="METRIC",
        help=(
            "Keep the best model by this metric as best.safetensors: a federated metric such as "
            "accuracy, or test/NAME for one that --evaluate returns. Lower is better for a loss "
            "or an error."
        ),
    ),
    click.option(
        "--target",
        type=FiniteFloat(),
        metavar="VALUE",
        help=(
            "End the run when the --monitor metric, or the loss without --monitor, reaches "
            "this value."
        ),
    ),
    click.option(
        "--patience",
        type=count(),
        metavar="ROUNDS",
        help="End the run when that metric has not improved for this many rounds.",
    ),
    click.option(
        "--time-budget",
        type=seconds(min_open=True),
        metavar="SECONDS",
        help="End the run after the round in which the total time of its rounds reaches this.",
    ),
)
