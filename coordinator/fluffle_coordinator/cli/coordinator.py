"""``fluffle coordinator``, and ``fluffle history`` and ``fluffle plot`` of the runs it made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from fluffle_common.cli.printing import echo, echo_json, screen
from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.cli.plan_options import plan_options
from fluffle_coordinator.cli.schedule_options import (
    QuorumType,
    check_schedule_options,
    schedule_options,
)
from fluffle_coordinator.cli.stopping_options import stopping_options

if TYPE_CHECKING:
    from fluffle_coordinator.machine.state import Quorum, Rules


def run_option(command: Any) -> Any:
    """Add ``--run DIR`` to a command that reads a run folder."""
    return click.option(
        "--run",
        "folder",
        required=True,
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="The run folder, such as runs/letters.",
    )(command)


@click.command(cls=ConfiguredCommand, context_settings={"show_default": True})
@federation_option
@url_option
@click.option("--rounds", type=count(), default=6, help="Number of rounds.")
@click.option(
    "--min-workers",
    type=count(),
    help=(
        "Workers that must be present before the first round. No round commits with fewer "
        "updates than the quorum of this many.  [default: the quorum if that is a number, "
        "else 2]"
    ),
    show_default=False,
)
@click.option(
    "--quorum",
    type=QuorumType(),
    default="all",
    metavar="N|FRACTION|all",
    help="Updates that close a round: a number, a fraction of the workers asked, or all of them.",
)
@click.option(
    "--grace",
    type=seconds(),
    default=0.0,
    help="Seconds to wait for more updates after the quorum.",
)
@click.option(
    "--deadline",
    type=seconds(min_open=True),
    default=600.0,
    help="Seconds that a round may stay open without reaching its quorum.",
)
@click.option(
    "--on-deadline",
    type=click.Choice(["reopen", "close", "stop"]),
    default="reopen",
    help=(
        "When the deadline passes: reopen the round with the workers present, close it with "
        "the updates that have arrived (at least --min-updates), or stop the run."
    ),
)
@click.option(
    "--min-updates",
    type=count(),
    default=1,
    help="Minimum number of updates for '--on-deadline close'.",
)
@schedule_options
@click.option(
    "--strategy",
    default="fedavg",
    metavar="NAME[:ARGUMENTS]|path.py:name",
    help=(
        "How updates become the next model, such as fedadam:lr=0.03, median or "
        "clip:10+trimmed:0.2 ('fluffle strategies' lists all), or an object in your own file."
    ),
)
@click.option(
    "--evaluate",
    metavar="path.py:name",
    help=(
        "Your own function that tests the model of every round: it gets the weights by name "
        "and returns metrics by name. The next round waits for it."
    ),
)
@click.option(
    "--on-round",
    metavar="path.py:name",
    help=(
        "Your own function that is called after every commit. If it returns a reason, the "
        "run ends there."
    ),
)
@stopping_options
@plan_options
@click.option("--seed", type=SEED, default=0, help="Seed of every random choice.")
@click.option(
    "--classes",
    metavar="A,B,…",
    help="Classes that every worker must have.  [default: those of most of the workers waiting]",
    show_default=False,
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Start from the weights in this model file.  [default: a worker initializes them]",
    show_default=False,
)
@click.option(
    "--run",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Run folder.  [default: runs/FEDERATION]",
    show_default=False,
)
@click.option(
    "--max-round",
    type=seconds(min_open=True),
    default=86400.0,
    metavar="SECONDS",
    help=(
        "Maximum time that a round stays open. Until then, workers that make progress keep it "
        "open past its deadline."
    ),
)
@click.option(
    "--stall-timeout",
    type=seconds(min_open=True),
    metavar="SECONDS",
    help=(
        "Count a training as failed if it makes no progress for this long.  [default: only "
        "reported, after 2 minutes]"
    ),
    show_default=False,
)
@click.option(
    "--max-examples",
    type=count(),
    metavar="N",
    help=(
        "Maximum weight of an update in the average.  [default: the number of examples that "
        "its worker announced]"
    ),
    show_default=False,
)
@click.option(
    "--max-norm-ratio",
    type=FiniteFloat(1),
    metavar="R",
    help=(
        "Reject an update whose norm is more than R times the median of the last five rounds.  "
        "[default: only reported, from 10 times on]"
    ),
    show_default=False,
)
@click.option("--fresh", is_flag=True, help="Start a new run; an earlier run is moved aside.")
@click.option(
    "--wait-workers",
    type=seconds(min_open=True),
    default=86400.0,
    help="Seconds to wait for enough workers before giving up.",
)
@click.option(
    "--wait-broker",
    type=seconds(min_open=True),
    default=600.0,
    help="Seconds to wait for an unreachable broker before giving up.",
)
@click.option(
    "--verify-users",
    is_flag=True,
    help=(
        "Require each worker to log in to the broker as the user with its id as the name; "
        "messages that another user sends in its name are rejected."
    ),
)
@click.option(
    "--keep-updates",
    is_flag=True,
    help=(
        "Keep every counted update in the run folder, for 'fluffle replay'. A round then takes "
        "as many bytes as all its updates."
    ),
)
@click.option(
    "--dashboard",
    metavar="HOST:PORT",
    help=(
        "Show the run on a read-only live page at this address, such as 127.0.0.1:8080, with "
        "/metrics for Prometheus; port 0 chooses a free port. Needs 'fluffle[dashboard]'."
    ),
)
@management_option
@queue_type_option
@log_format_option
def coordinator(**options: Any) -> None:
    """Run a federation: open rounds, average updates, keep models.

    The coordinator waits for workers and sends them the global weights. As soon as a quorum of
    updates has arrived, it averages them by number of examples and opens the next round. Every
    round's model is kept in the run folder; its updates are acknowledged once it is on disk.

    After Ctrl-C or a crash, the same command continues after the last committed round. A second
    coordinator on the same run folder waits, and takes over when the first is gone.

    \b
      fluffle coordinator --federation letters --quorum 3
      fluffle coordinator --federation letters --quorum 0.5 --deadline 300
      fluffle coordinator federation.toml --rounds 12

    Every option can also be set in a TOML file, as a key of the same name: 'rounds = 6'. An option
    on the command line overrides its key.
    """
    from fluffle_coordinator.service.app import run_coordinator

    if options["compress"] and options["upload_dtype"] != "float32":
        raise UsageError("--upload-dtype and --compress exclude each other; give one of them")
    check_schedule_options(options)
    run_coordinator(rules_of(options), options)


def rules_of(options: dict[str, Any]) -> Rules:
    """Return the rules of a run that the command's options describe.

    Raises:
        UsageError: if two options contradict each other.
    """
    from fluffle_coordinator.machine.selection import sample_size
    from fluffle_coordinator.machine.state import Rules

    quorum: Quorum = options["quorum"]
    fraction: float = options["fraction"]
    min_workers: int | None = options["min_workers"]
    sample: int | None = options["sample"]
    if sample is not None and fraction < 1:
        raise UsageError("--fraction and --sample exclude each other; give one of them")
    least = quorum.number or 1
    if min_workers:
        cohort = min(sample, min_workers) if sample else sample_size(fraction, min_workers)
        least = quorum.of(cohort)
    if quorum.number is not None and options["min_updates"] > quorum.number:
        raise UsageError(
            f"--min-updates {options['min_updates']} is more than --quorum {quorum.number}, "
            "and a round commits at its quorum; lower --min-updates"
        )
    return Rules(
        rounds=options["rounds"],
        min_workers=min_workers or quorum.number or 2,
        least=least,
        quorum=quorum,
        grace_s=options["grace"],
        deadline_s=options["deadline"],
        on_deadline=options["on_deadline"],
        min_updates=options["min_updates"],
        fraction=fraction,
        sample=sample,
        over_provision=options["over_provision"],
        selection=options["select"],
        max_examples=options["max_examples"],
        max_norm_ratio=options["max_norm_ratio"],
        max_round_s=options["max_round"],
        stall_timeout_s=options["stall_timeout"],
        seed=options["seed"],
        wait_s=options["wait_workers"],
    )


@click.command()
@run_option
@click.option("--json", "as_json", is_flag=True, help="Print a list with one object per round.")
def history(folder: Path, as_json: bool) -> None:
    """Show the history of a run, one row per round.

    Loss and metrics are those of the round's model on the workers' held-out data. The letters
    task's metric 'temperature' calibrates the model: 'fluffle predict' divides the model's outputs
    by it, so that its confidence matches its accuracy; 1 changes nothing.
    """
    from fluffle_coordinator.cli.history_table import history_table
    from fluffle_coordinator.storage.history import read_history

    rounds = read_history(folder)
    if as_json:
        echo_json(rounds)
    else:
        # In a pipe, too, the reader usually is at a terminal: use its width.
        console = screen(width_in_a_pipe=shutil.get_terminal_size().columns)
        console.print(history_table(rounds, console.width))


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
    """Draw the federated accuracy and loss after each round."""
    from fluffle_coordinator.cli.history_table import draw_history
    from fluffle_coordinator.storage.history import read_history

    rounds = [row for row in read_history(folder) if "loss" in row]
    if not rounds:
        raise UsageError(f"no round of {folder} has been evaluated yet")
    try:
        draw_history(rounds, out)
    except ImportError:
        raise UsageError("charts need matplotlib: pip install 'fluffle[plot]'") from None
    except OSError as why:
        raise RunError(f"cannot write {out} ({why.strerror})") from None
    echo(f"chart written to {out}")
