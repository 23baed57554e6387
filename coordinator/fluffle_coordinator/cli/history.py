"""``fluffle history`` and ``fluffle plot``: show the rounds of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from fluffle_common.cli.output_files import CHART_FILE, draw_into_files, save_chart
from fluffle_common.cli.printing import echo, echo_json
from fluffle_coordinator.cli.run_folder import run_argument


@click.command()
@run_argument
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON list with one object per round."
)
def history(folder: Path, as_json: bool) -> None:
    """Show the history of a run, one row per round.

    RUN is the run folder, such as runs/letters.

    The loss and the metrics show how well a round's model performs on the workers' held-out data.
    The letters task has a metric 'temperature'. 'fluffle predict' divides the model's outputs by
    the temperature, so that the model's confidence matches its accuracy. A temperature of 1 changes
    nothing.
    """
    from fluffle_coordinator.cli.history_table import history_tables
    from fluffle_coordinator.storage.history import read_history

    rounds = read_history(folder)
    if as_json:
        echo_json(rounds)
    else:
        # In a pipe, too, the reader usually is at a terminal: use its width.
        first, *others = history_tables(rounds, shutil.get_terminal_size().columns)
        echo(*first, *(line for lines in others for line in ("", *lines)))


@click.command()
@run_argument
@click.option(
    "--out", type=CHART_FILE, required=True, metavar="PNG", help="File to write the chart to."
)
def plot(folder: Path, out: Path) -> None:
    """Draw the losses and the other metrics after each round.

    RUN is the run folder, such as runs/letters.
    """
    from fluffle_coordinator.cli.history_chart import history_chart
    from fluffle_coordinator.storage.history import read_history

    draw_into_files()
    save_chart(history_chart(read_history(folder)), out)
    echo(f"chart written to {out}")
