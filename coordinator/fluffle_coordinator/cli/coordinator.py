"""``fluffle coordinator``: run a federation."""

from __future__ import annotations

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
from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.plan_options import plan_options
from fluffle_coordinator.cli.round_options import round_options, stopping_options
from fluffle_coordinator.cli.schedule_options import check_schedule_options, schedule_options

_MOST_ROUNDS = 10**9  # as on the wire


@click.command(cls=ConfiguredCommand, context_settings={"show_default": True})
@federation_option
@url_option
@click.option("--rounds", type=count(most=_MOST_ROUNDS), default=6, help="Number of rounds.")
@round_options
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
@click.option("--seed", type=SEED, default=0, help="Seed for all random choices.")
@click.option(
    "--classes",
    metavar="A,B,…",
    help="Names of all classes in the federation, in order; a worker with a different list is "
    "refused.  [default: the most common list among the waiting workers]",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Model file (safetensors) that a new run starts from.  [default: a worker initializes the "
    "weights]",
)
@click.option(
    "--run",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the models and the history of this run.  [default: runs/FEDERATION]",
)
@click.option(
    "--max-examples",
    type=count(),
    metavar="N",
    help="Largest weight, in examples, that one update can have in the average.  "
    "[default: the number of examples that its worker announced]",
)
@click.option(
    "--max-norm-ratio",
    type=FiniteFloat(1),
    metavar="R",
    help="Maximum norm of an update, as a multiple of the median norm in the last five "
    "rounds; updates with a larger norm are rejected.  [default: no limit, but a warning if the "
    "norm exceeds 10 times the median]",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Start a new run; an earlier run in the run folder is moved aside.",
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
    "reject messages that any other user sends in a worker's name.",
)
@click.option(
    "--keep-checkpoints",
    type=count(2),
    metavar="N",
    help="Number of recent checkpoints to keep. Older checkpoints are removed after each round, "
    "except the first weights. With --monitor, the coordinator also keeps the best model and, "
    "because workers may still evaluate recent models, at least --max-staleness + 2 checkpoints. "
    "If the newest checkpoint is damaged, the run continues from the previous one, so N must be "
    "at least 2.  [default: keep all checkpoints]",
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
    "a free port. The path /metrics serves metrics for Prometheus. Requires 'fluffle[dashboard]'.",
)
@management_option
@queue_type_option
@log_format_option
def coordinator(**options: Any) -> None:
    """Run a federation: open rounds, average updates, keep models.

    The coordinator waits for workers and sends them the global weights. When a quorum of updates
    has arrived, the coordinator averages them, weighted by their numbers of examples, and opens the
    next round. It keeps every round's model in the run folder, and acknowledges a round's updates
    when the model is on disk.

    After Ctrl-C or a crash, the same command resumes the run after the last committed round. A
    second coordinator with the same run folder waits, and takes over when the first one is gone.

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
