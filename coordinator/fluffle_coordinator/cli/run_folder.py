"""``fluffle replay`` and ``fluffle report``: read the folder of a run, also long after its end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import count
from fluffle_common.cli.output_files import OutputFile, output_file
from fluffle_common.cli.printing import echo, echo_json, echo_sentences, screen, table
from fluffle_common.errors import UsageError
from fluffle_common.plural import listed, plural

if TYPE_CHECKING:
    from fluffle_coordinator.storage.replay import Distance, Replay
    from fluffle_coordinator.strategy.base import Strategy

_DIFFERENT = 1  # the exit code of cmp and diff


def _run_folder(_: click.Context, __: click.Parameter, folder: Path) -> Path:
    if not folder.exists():
        inside = Path("runs") / folder
        hint = f"did you mean '{inside}'?" if inside.is_dir() else "give one such as runs/letters"
        raise UsageError(f"there is no run folder '{folder}'; {hint}")
    return folder


run_argument = click.argument(
    "folder", metavar="RUN", type=click.Path(file_okay=False, path_type=Path), callback=_run_folder
)


@click.command()
@run_argument
@click.option(
    "--round", "number", type=count(), required=True, help="Number of the round to replay."
)
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    metavar="PATH.PY:NAME",
    help="Your own codec, as path.py:name; needed only if the coordinator's --compress named it.",
)
@click.option(
    "--strategy",
    metavar="NAME|path.py:name",
    help="Strategy of the run, as path.py:name or module:name. Needed only for your own strategy: "
    "replay runs its code only if you name it here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every tensor.")
def replay(
    folder: Path, number: int, codecs: tuple[str, ...], strategy: str | None, as_json: bool
) -> None:
    """Average a round's kept updates again, and compare the result.

    RUN is the run folder, such as runs/letters, of a coordinator that ran with --keep-updates.
    Replay starts from the model of the previous round. The round's updates go through the
    coordinator's checks and the run's strategy again, in their original order. The resulting model
    is compared bit for bit with the committed model.

    The exit code is 0 if the models are equal, 1 if they differ, and 2 if a file is missing or
    damaged.

    \b
      fluffle coordinator --federation letters --keep-updates
      fluffle replay runs/letters --round 3
    """
    from fluffle_common.cli.loading import load_codec
    from fluffle_coordinator.storage.replay import replay as replay_round

    for codec in codecs:
        load_codec(codec, "--codec")
    comparison = replay_round(folder, number, _strategy(folder, number, strategy))
    if as_json:
        echo_json(comparison.as_json())
    else:
        _print(comparison)
    if not comparison.equal:
        sys.exit(_DIFFERENT)


def _strategy(folder: Path, number: int, given: str | None) -> Strategy[Any]:
    """Load the strategy that made a round.

    A user's own strategy must be ``given``: whoever made the folder must not choose the code to
    run.
    """
    from fluffle_coordinator.storage.replay import strategy_of
    from fluffle_coordinator.user_code.guarded_strategy import GuardedStrategy
    from fluffle_coordinator.user_code.strategy_loading import is_installed, load_strategy

    name, file = strategy_of(folder, number)
    recorded = name
    if ":" not in name and not is_installed(name):  # the class of an object of a Python program
        recorded = "path.py:name"
    elif file:
        recorded = f"{file}:{name.rpartition(':')[2]}"
    if given is None and not is_installed(name):
        raise UsageError(
            f"round {number} of {folder} was made with the strategy {name}, which is neither "
            "built in nor added by an installed package; if you trust its code, give --strategy "
            f"{recorded}"
        )
    named = load_strategy(given or name)
    if name not in (named.name, load_strategy(named.strategy).name):
        raise UsageError(
            f"round {number} of {folder} was made with the strategy {name}, not {named.name}; "
            f"give --strategy {recorded}"
        )
    if not named.strategy.needs.repeatable:
        raise UsageError(
            f"round {number} of {folder} cannot be replayed, because the strategy {name} adds "
            "random noise that is not kept"
        )
    return GuardedStrategy(named, number)


def _print(comparison: Replay) -> None:
    tensors = comparison.tensors
    rows = table()
    for name in ("tensor", "dtype", "shape", "committed"):
        rows.add_column(name, overflow="fold")
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "()"
        rows.add_row(tensor.name, tensor.dtype, shape, _words(tensor.replayed))
    screen().print(rows)
    workers = listed([f"{u['worker']} ({u['num_examples']})" for u in comparison.participants])
    echo_sentences(
        f"round {comparison.round} of run {comparison.run} was averaged again from the updates "
        f"of {workers} and compared with {comparison.checkpoint}"
    )
    wrong = [tensor.name for tensor in tensors if not tensor.replayed.equal]
    if wrong:
        echo(
            f"DIFFERENT: {len(wrong)} of {len(tensors)} tensors differ from the committed model: "
            + ", ".join(wrong)
        )
    else:
        echo(f"equal: all {len(tensors)} tensors match the committed model bit for bit")


def _words(distance: Distance) -> str:
    if distance.equal:
        return "equal"
    values = "value differs" if distance.different == 1 else "values differ"
    return (
        f"{distance.different:,} {values}, at most {distance.largest:.3g} "
        f"({plural(distance.ulps, 'ulp')})"
    )


@click.command()
@run_argument
@click.option(
    "--out",
    type=OutputFile(".html", "the report is an HTML page"),
    metavar="HTML",
    help="File to write the page to.  [default: report.html in the run folder]",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the report's data as JSON instead of writing a page.",
)
def report(folder: Path, out: Path | None, as_json: bool) -> None:
    """Write a report of a run: one HTML file, to keep or to send.

    The report is the run's live page, saved as one file that works without a network. The
    report shows the curves, the participants and times of each round, late and rejected updates
    with the reasons, the configuration, the software versions, and the checkpoints with their
    SHA-256. The curves show every round; the page has the details and the checkpoints of the last
    1,000 rounds, and --json prints those of all rounds. RUN is the run folder, such as
    runs/letters. You can also write a report while the run continues.

    \b
      fluffle report runs/letters --out report.html
    """
    from fluffle_coordinator.dashboard.report import MAX_DETAILED, page, read_report

    if as_json and out is not None:
        raise UsageError("--out conflicts with --json, which writes no page; remove one of them")
    if as_json:
        echo_json(read_report(folder, time.time()))
        return
    data = read_report(folder, time.time(), MAX_DETAILED)
    out = out or folder / "report.html"
    with output_file(out) as file:
        file.write(page(data).encode())
    echo(f"report written to {out}")
