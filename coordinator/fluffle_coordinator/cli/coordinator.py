"""``fluffle coordinator``, and what there is to see of a run afterwards."""

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
from fluffle_common.cli.config_file import ConfiguredCommand, KeyValue
from fluffle_common.cli.console import log_format_option
from fluffle_common.cli.printing import echo, echo_json, screen
from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.cli.compress import CompressType
from fluffle_coordinator.cli.schedule_options import check_schedule_options, schedule_options
from fluffle_coordinator.cli.stopping import stopping_options

if TYPE_CHECKING:
    from fluffle_coordinator.machine.state import Quorum, Rules

_MOST_COUNT = 2**31 - 1


class QuorumType(click.ParamType[Any]):
    """``all``, a number of updates (``2``), or a fraction of those asked (``0.5``, ``50%``)."""

    name = "quorum"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Quorum:
        """Parse it."""
        from fluffle_coordinator.machine.state import Quorum

        if isinstance(value, Quorum):
            return value
        text = str(value).strip()
        if text == "all":
            return Quorum()
        try:
            if text.endswith("%"):
                fraction = float(text[:-1]) / 100
            elif text.isdecimal() and 0 < int(text[:11]) <= _MOST_COUNT:
                return Quorum(number=int(text))
            else:
                fraction = float(text)
            if 0 < fraction < 1 or (text.endswith("%") and fraction == 1):
                return Quorum(fraction=fraction)
        except ValueError:
            pass
        self.fail(
            f"'{text}' is no quorum; give a number of updates from 1 (2), "
            "a fraction of those asked (0.5 or 50%), or 'all'",
            param,
            ctx,
        )


def run_option(command: Any) -> Any:
    """Add ``--run DIR`` to a command that looks at a run."""
    return click.option(
        "--run",
        "folder",
        required=True,
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="The run's folder, such as runs/letters.",
    )(command)


@click.command(cls=ConfiguredCommand, context_settings={"show_default": True})
@federation_option
@url_option
@click.option("--rounds", type=count(), default=6, help="How many rounds to run.")
@click.option(
    "--min-workers",
    type=count(),
    help="Workers that must be present before the first round. No round then commits with fewer "
    "updates than the quorum of so many.  [default: the quorum if that is a number, else 2]",
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
    help="Seconds to wait for the others after the quorum.",
)
@click.option(
    "--deadline",
    type=seconds(min_open=True),
    default=600.0,
    help="Seconds that a round may stay open without a quorum.",
)
@click.option(
    "--on-deadline",
    type=click.Choice(["reopen", "close", "stop"]),
    default="reopen",
    help="When the deadline passes: reopen the round with the workers present, close it with what "
    "has arrived if that is --min-updates, or stop the run.",
)
@click.option(
    "--min-updates",
    type=count(),
    default=1,
    help="Fewest updates that '--on-deadline close' commits with.",
)
@schedule_options
@click.option(
    "--strategy",
    default="fedavg",
    metavar="NAME[:ARGUMENTS]|path.py:name",
    help="How updates become the next model: such as fedadam:lr=0.03, median or "
    "clip:10+trimmed:0.2 ('fluffle strategies' lists all), or an object in a file of your own.",
)
@click.option(
    "--evaluate",
    metavar="path.py:name",
    help="A function of your own that tests every round's model here: it gets the weights by name "
    "and returns metrics by name. The next round waits for it.",
)
@click.option(
    "--on-round",
    metavar="path.py:name",
    help="A function of your own that is shown every commit; a reason that it returns ends the "
    "run there.",
)
@stopping_options
@click.option("--epochs", type=count(), default=1, help="Local epochs a round.")
@click.option(
    "--steps",
    type=count(),
    help="Local training steps a round, in place of --epochs.",
)
@click.option("--batch-size", type=count(), default=32, help="Local batch size.")
@click.option(
    "--learning-rate",
    type=FiniteFloat(0, min_open=True),
    help="Local learning rate.  [default: the task's own]",
    show_default=False,
)
@click.option(
    "--learning-rate-schedule",
    default="constant",
    metavar="NAME",
    help="How --learning-rate changes from round to round: constant, cosine, exponential:FACTOR, "
    "or step:ROUNDS,FACTOR.",
)
@click.option(
    "--config",
    type=KeyValue(),
    multiple=True,
    metavar="KEY=VALUE",
    help="Anything else a task wants to know; may be given several times.",
)
@click.option(
    "--upload-dtype",
    type=click.Choice(["float32", "bf16", "f16"]),
    default="float32",
    help="What floats in updates are rounded to on the wire, half the bytes with bf16 and f16; "
    "float32 leaves them as they are.",
)
@click.option(
    "--compress",
    type=CompressType(),
    metavar="int8|topk:FRACTION|PATH.PY:NAME",
    help="Send updates as 8-bit integers with scales, about a quarter of the bytes, or only the "
    "largest values, such as topk:0.01 for one in a hundred. What is not sent is added to the "
    "worker's next update. Or encode them by a codec of your own (docs/codecs.md).  "
    "[default: neither]",
    show_default=False,
)
@click.option(
    "--train",
    multiple=True,
    metavar="TENSOR",
    help="Train this tensor of the model, or all that begin so, as with 'head/*'; may be given "
    "several times. The others stay as they are, and do not travel back.  [default: all]",
    show_default=False,
)
@click.option("--seed", type=SEED, default=0, help="Seed of everything random.")
@click.option(
    "--classes",
    metavar="A,B,…",
    help="Classes that workers must have.  [default: those of most of the workers waiting]",
    show_default=False,
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Begin with the weights in this model file.  [default: a worker makes them]",
    show_default=False,
)
@click.option(
    "--run",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where the run is kept.  [default: runs/FEDERATION]",
    show_default=False,
)
@click.option(
    "--max-round",
    type=seconds(min_open=True),
    default=86400.0,
    metavar="SECONDS",
    help="How long a round may be open in all. Until then, workers that advance keep it alive at "
    "its deadlines.",
)
@click.option(
    "--stall-timeout",
    type=seconds(min_open=True),
    metavar="SECONDS",
    help="A training that does not advance for so long counts as failed.  [default: only reported, "
    "after 2 minutes]",
    show_default=False,
)
@click.option(
    "--max-examples",
    type=count(),
    metavar="N",
    help="The largest weight that an update may have in the average.  [default: the number of "
    "examples that its worker announced]",
    show_default=False,
)
@click.option(
    "--max-norm-ratio",
    type=FiniteFloat(1),
    metavar="R",
    help="Refuse an update whose norm is more than R times the median of the last round's.  "
    "[default: only reported, from 10 on]",
    show_default=False,
)
@click.option("--fresh", is_flag=True, help="Start anew; an earlier run is moved aside.")
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
    help="Seconds to wait for a broker that cannot be reached before giving up.",
)
@click.option(
    "--verify-users",
    is_flag=True,
    help="Each worker logs in to the broker as a user named like its id: what is sent in its name "
    "by anyone else is rejected.",
)
@click.option(
    "--keep-updates",
    is_flag=True,
    help="Keep every update that is counted, as it came, in the run folder, for 'fluffle replay': "
    "as many bytes a round as all updates have.",
)
@click.option(
    "--dashboard",
    metavar="HOST:PORT",
    help="Show the run on a live page there, such as 127.0.0.1:8080, with /metrics for Prometheus; "
    "port 0 is any free one. It can only be read. Needs 'fluffle[dashboard]'.",
)
@management_option
@queue_type_option
@log_format_option
def coordinator(**options: Any) -> None:
    """Open rounds, average the updates, keep every model.

    It waits for workers, sends them the global weights, and as soon as a quorum has answered,
    averages what they learnt by their number of examples and opens the next round. Every round's
    model is kept in the run folder; updates are acknowledged once it is on disk.

    Stop it with Ctrl-C, or lose it to a crash: the same command goes on after the last round that
    was committed. A second one on the same run folder waits and takes over when the first is gone.

    \b
      fluffle coordinator --federation letters --quorum 3
      fluffle coordinator --federation letters --quorum 0.5 --deadline 300
      fluffle coordinator federation.toml --rounds 12

    Every option may also stand in a TOML file, as a key of the same name: 'rounds = 6'. A flag
    overrides its key.
    """
    from fluffle_coordinator.service.app import run_coordinator

    if options["compress"] and options["upload_dtype"] != "float32":
        raise UsageError("--upload-dtype and --compress exclude each other; give one of them")
    check_schedule_options(options)
    run_coordinator(rules_of(options), options)


def rules_of(options: dict[str, Any]) -> Rules:
    """Turn options into the rules of a run."""
    from fluffle_coordinator.machine.selection import UNIFORM, sample_size
    from fluffle_coordinator.machine.state import Rules

    quorum: Quorum = options["quorum"]
    fraction: float = options["fraction"]
    written = options["min_workers"]
    asked_for: int | None = options.get("sample")
    if asked_for is not None and fraction < 1:
        raise UsageError("--fraction and --sample exclude each other; give one of them")
    sample = (
        min(asked_for, written or asked_for) if asked_for else sample_size(fraction, written or 1)
    )
    least = quorum.of(sample) if written else quorum.number or 1
    if quorum.number is not None and options["min_updates"] > quorum.number:
        raise UsageError(
            f"--min-updates {options['min_updates']} is more than --quorum {quorum.number}: a "
            "round that has its quorum commits; lower one of them"
        )
    return Rules(
        rounds=options["rounds"],
        min_workers=written or quorum.number or 2,
        least=least,
        quorum=quorum,
        grace_s=options["grace"],
        deadline_s=options["deadline"],
        on_deadline=options["on_deadline"],
        min_updates=options["min_updates"],
        fraction=fraction,
        sample=asked_for,
        over_provision=options.get("over_provision", 1.0),
        selection=options.get("select") or UNIFORM,
        max_examples=options["max_examples"],
        max_norm_ratio=options["max_norm_ratio"],
        max_round_s=options["max_round"],
        stall_timeout_s=options["stall_timeout"],
        seed=options["seed"],
        wait_s=options["wait_workers"],
    )


@click.command()
@run_option
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one a round.")
def history(folder: Path, as_json: bool) -> None:
    """Show what is known of every round of a run, one row a round.

    Loss and metrics are those of the round's model on what the workers hold out. The metric
    temperature, of the letters task, is what 'fluffle predict' divides the model's outputs by so
    that the model is right as often as it is sure; 1 changes nothing.
    """
    from fluffle_coordinator.cli.history_table import history_table
    from fluffle_coordinator.storage.history import read_history

    rounds = read_history(folder)
    if as_json:
        echo_json(rounds)
    else:
        # `| tail` ends on a terminal all the same; COLUMNS says how wide one is.
        shown = screen(width_in_a_pipe=shutil.get_terminal_size().columns)
        shown.print(history_table(rounds, shown.width))


@click.command()
@run_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="PNG",
    help="Where to write the chart.",
)
def plot(folder: Path, out: Path) -> None:
    """Draw the federated accuracy and loss after each round."""
    from fluffle_coordinator.cli.history_table import draw_history
    from fluffle_coordinator.storage.history import read_history

    rounds = [one for one in read_history(folder) if "loss" in one]
    if not rounds:
        raise UsageError(f"no round of {folder} has been evaluated yet")
    try:
        draw_history(rounds, out)
    except ImportError:
        raise UsageError("charts need matplotlib: pip install 'fluffle[plot]'") from None
    except OSError as why:
        raise RunError(f"cannot write {out} ({why.strerror})") from None
    echo(f"chart written to {out}")
