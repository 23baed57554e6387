"""The options of ``fluffle coordinator`` that end a run early."""

from __future__ import annotations

import click

from fluffle_common.cli.app import FiniteFloat, count, seconds
from fluffle_coordinator.cli.option_group import option_group

stopping_options = option_group(
    click.option(
        "--monitor",
        metavar="METRIC",
        help="Metric by which the best model is chosen and kept as best.safetensors: a federated "
        "metric such as accuracy, or test/NAME for a metric that --evaluate returns. Lower is "
        "better for a loss or an error.",
    ),
    click.option(
        "--target",
        type=FiniteFloat(),
        metavar="VALUE",
        help="Value of the --monitor metric (or of the loss, without --monitor) at which the run "
        "ends.",
    ),
    click.option(
        "--patience",
        type=count(),
        metavar="ROUNDS",
        help="Number of rounds without improvement of the --monitor metric (or of the loss, "
        "without --monitor) after which the run ends.",
    ),
    click.option(
        "--time-budget",
        type=seconds(min_open=True),
        metavar="SECONDS",
        help="Time limit for all rounds together, in seconds. The run ends after the round in "
        "which the limit is reached.",
    ),
)
