"""The options that say when a run has done enough."""

from __future__ import annotations

from typing import Any

import click

from fluffle_common.cli.app import FiniteFloat, count, seconds

_OPTIONS = [
    click.option(
        "--monitor",
        metavar="METRIC",
        help=(
            "Keep the best model by this metric as best.safetensors: a federated metric, "
            "such as accuracy, or test/NAME of --evaluate. For a loss or an error, lower is "
            "better."
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
        help="End the run when the best model by the same metric is this many rounds old.",
    ),
    click.option(
        "--time-budget",
        type=seconds(min_open=True),
        metavar="SECONDS",
        help="End the run after the round in which its rounds reach this total time.",
    ),
]


def stopping_options(command: Any) -> Any:
    """Add them to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
