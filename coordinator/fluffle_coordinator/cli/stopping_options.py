"""The options of ``fluffle coordinator`` that end a run early."""

from __future__ import annotations

import click

from fluffle_common.cli.app import FiniteFloat, count, seconds
from fluffle_coordinator.cli.option_group import option_group

stopping_options = option_group(
    click.option(
        "--monitor",
        metavar="METRIC",
        help="Metric for --target and --patience; the model with the best value of this metric is "
        "kept as best.safetensors. Give a federated metric such as accuracy, or test/NAME for a "
        "metric of your --evaluate function. Lower is better if the name ends with loss, error, "
        "error_rate, mse, mae, mape, nll, entropy or perplexity; otherwise, higher is better.  "
        "[default: the loss, and no best model is kept]",
    ),
    click.option(
        "--target",
        type=FiniteFloat(),
        metavar="VALUE",
        help="End the run when the --monitor metric reaches this value.",
    ),
    click.option(
        "--patience",
        type=count(),
        metavar="ROUNDS",
        help="End the run when the --monitor metric has not improved for this number of rounds.",
    ),
    click.option(
        "--time-budget",
        type=seconds(min_open=True),
        metavar="SECONDS",
        help="Time limit in seconds for all rounds together. The run ends after the round that "
        "exceeds this limit.  [default: no limit]",
    ),
)
