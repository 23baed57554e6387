"""``fluffle coordinator``, and ``fluffle history`` and ``fluffle plot`` of the runs it made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from fluffle_common.cli.app import (
    SEED,
    FiniteFloat,
    count,
    federation_option,
    management_option,
    queue_type_option,
    seconds,
    url_option,
)
from fluffle_common.cli.config_file import ConfiguredCommand
from fluffle_common.cli.console import log_format_option
from fluffle_common.cli.printing import echo, echo_json
from fluffle_common.cli.settings import draw_into_files
from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.cli.plan_options import plan_options
from fluffle_coordinator.cli.schedule_options import (
    QUORUM,
    check_schedule_options,
    schedule_options,
)
from fluffle_coordinator.cli.stopping_options import stopping_options

MOST_ROUNDS = 10**9  # as on the wire


def run_option(command: Any) -> Any:
    """Add ``--run DIR`` to a command that reads a run folder."""
    return click.option(
        "--run",
        "folder",
        required=True,
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="Run folder, such as runs/letters.",
    )(command)


@click.command(cls=ConfiguredCommand, context_settings={"show_default": True})
@federation_option
@url_option
@click.option("--rounds", type=count(most=MOST_ROUNDS), default=6, help="Number of rounds.")
@click.option(
    "--min-workers",
    type=count(),
    metavar="N",
    help="Number of workers that must be connected before the first round starts. If you set this "
    "option, the quorum is also computed as if at least N workers were connected: with "
    "N = 4 and --quorum 0.5, a round needs at least 2 updates. This second effect does not apply "
    "with --select poisson or path.py:name.  [default: --quorum if given as a number, else 2]",
)
@click.option(
    "--quorum",
    type=QUORUM,
    default="all",
    metavar="N|FRACTION|all",
    help="Number of updates that must arrive before a round can close: a number such as 2, a "
    "fraction of the selected workers such as 0.5 or 50%, or 'all' for one update from every "
    "selected worker.",
)
@click.option(
    "--grace",
    type=seconds(),
    default=0.0,
    help="Seconds that a round waits for more updates after it has reached its quorum.",
)
@click.option(
    "--deadline",
    type=seconds(min_open=True),
    default=600.0,
    help="Time limit in seconds for a round to reach its quorum.",
)
@click.option(
    "--on-deadline",
    type=click.Choice(["reopen", "close", "stop"]),
    default="reopen",
    help="Action when the deadline of a round passes: 'reopen' opens the round again with the "
    "connected workers, 'close' closes the round with the updates that have arrived (at least "
    "--min-updates), and 'stop' ends the run.",
)
@click.option(
    "--min-updates",
    type=count(),
    default=1,
    help="With '--on-deadline close', a round is closed at its deadline only if at least this many "
    "updates have arrived.",
)
@schedule_options
@click.option(
    "--strategy",
    default="fedavg",
    metavar="NAME[:ARGUMENTS]|path.py:name",
    help="Strategy that turns updates into the next model, such as fedadam:lr=0.03 or "
    "clip:10+trimmed:0.2. 'fluffle strategies' lists the built-in strategies. For your own "
    "strategy, give path.py:name.",
)
@click.option(
    "--evaluate",
    metavar="path.py:name",
    help="Your own function, called after every round to evaluate the model. The function takes a "
    "dict of weights by name and returns a dict of metrics by name. The next round starts after "
    "the function returns.",
)
@click.option(
    "--on-round",
    metavar="path.py:name",
    help="Your own function, called after every commit. If the function returns a string, the run "
    "ends with this string as the reason.",
)
@stopping_options
@plan_options
@click.option("--seed", type=SEED, default=0, help="Seed of all random choices.")
@click.option(
    "--classes",
    metavar="A,B,…",
    help="Names of all classes in the federation; a worker with other classes is refused.  "
    "[default: the classes that most of the waiting workers have]",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Model file (safetensors) with the first weights.  [default: a worker initializes them]",
)
@click.option(
    "--run",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the models and the history of this run.  [default: runs/FEDERATION]",
)
@click.option(
    "--max-round",
    type=seconds(min_open=True),
    default=86400.0,
    metavar="SECONDS",
    help="Maximum time in seconds that a round stays open. Workers that make progress keep a "
    "round open after its --deadline, but never longer than --max-round.",
)
@click.option(
    "--stall-timeout",
    type=seconds(min_open=True),
    metavar="SECONDS",
    help="Seconds without progress after which a worker's training counts as failed. This option "
    "works only with tasks that call 'progress' while they train.  [default: no limit; after 2 "
    "minutes without progress, the coordinator prints a warning]",
)
@click.option(
    "--max-examples",
    type=count(),
    metavar="N",
    help="Largest weight, in examples, that one update can have in the average.  "
    "[default: the number that its worker announced when it connected]",
)
@click.option(
    "--max-norm-ratio",
    type=FiniteFloat(1),
    metavar="R",
    help="Maximum norm of an update, as a multiple of the median norm in the last five "
    "rounds; larger updates are rejected.  [default: no limit, but a warning for updates above "
    "10 times the median]",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Start a new run; an earlier run in the run folder is moved aside.",
)
@click.option(
    "--wait-workers",
    type=seconds(min_open=True),
    default=86400.0,
    help="Time limit in seconds for enough workers to connect.",
)
@click.option(
    "--wait-broker",
    type=seconds(min_open=True),
    default=600.0,
    help="Time limit in seconds for reaching the broker.",
)
@click.option(
    "--verify-users",
    is_flag=True,
    help="Require each worker to log in to the broker with its worker ID as the user name, and "
    "reject messages that another user sent.",
)
@click.option(
    "--keep-updates",
    is_flag=True,
    help="Keep every counted update in the run folder, for 'fluffle replay'.",
)
@click.option(
    "--dashboard",
    metavar="HOST:PORT",
    help="Address of a read-only live page of the run, such as 127.0.0.1:8080. Port 0 chooses "
    "a free port. The path /metrics has the figures for Prometheus. Requires 'fluffle[dashboard]'.",
)
@management_option
@queue_type_option
@log_format_option
def coordinator(**options: Any) -> None:
    """Run a federation: open rounds, average updates, keep models.

    The coordinator waits for workers and sends them the global weights. When a quorum of updates
    has arrived, it averages them, weighted by their numbers of examples, and opens the next round.
    It keeps every round's model in the run folder, and acknowledges a round's updates when the
    model is on disk.

    After Ctrl-C or a crash, the same command continues after the last committed round. A second
    coordinator on the same run folder waits, and takes over when the first one is gone.

    \b
      fluffle coordinator --federation letters --quorum 3
      fluffle coordinator --federation letters --quorum 0.5 --deadline 300
      fluffle coordinator federation.toml --rounds 12

    You can also set every option in a TOML file, as a key with the same name, such as 'rounds = 6'.
    An option on the command line overrides the key in the TOML file.
    """
    from fluffle_coordinator.service.app import run_coordinator

    if options["compress"] and options["upload_dtype"] != "float32":
        raise UsageError("--upload-dtype conflicts with --compress; use only one of them")
    check_schedule_options(options)
    run_coordinator(options)


@click.command()
@run_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON list with one object per round."
)
def history(folder: Path, as_json: bool) -> None:
    """Show the history of a run, one row per round.

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
@run_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="PNG",
    help="File to write the chart to.",
)
def plot(folder: Path, out: Path) -> None:
    """Draw the loss and the metrics after each round."""
    from fluffle_common.durable_files import replacing
    from fluffle_coordinator.cli.history_chart import history_chart
    from fluffle_coordinator.observe.round_view import metrics_of
    from fluffle_coordinator.storage.history import read_history

    if out.suffix.lower() not in ("", ".png"):
        raise UsageError(f"--out {out} must end with .png, because the chart is a PNG image")
    rounds = read_history(folder)
    drawn = sorted({name for row in rounds for name in metrics_of(row)})
    if any("loss" in row for row in rounds):
        drawn.insert(0, "loss")
    if not drawn:
        raise UsageError(f"no round of {folder} has been evaluated yet")
    draw_into_files()
    chart = history_chart(
        [row["round"] for row in rounds],
        {name: [row.get(name) for row in rounds] for name in drawn},
    )
    try:
        with replacing(out) as file:
            chart.savefig(file, dpi=150, format="png")
    except OSError as why:
        raise RunError(
            f"cannot write {out} ({why.strerror}); choose another file with --out"
        ) from None
    echo(f"chart written to {out}")
