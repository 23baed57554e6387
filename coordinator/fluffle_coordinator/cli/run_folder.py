"""``fluffle replay`` and ``fluffle report``: what a run folder tells long after the run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import count
from fluffle_common.cli.printing import echo, echo_json, echo_sentences, screen, table
from fluffle_common.errors import RunError, UsageError

if TYPE_CHECKING:
    from fluffle_coordinator.storage.replay import Distance, Replay
    from fluffle_coordinator.strategy.base import Strategy

_DIFFERENT = 1  # as cmp and diff have it

_run_argument = click.argument(
    "folder", metavar="RUN", type=click.Path(exists=True, file_okay=False, path_type=Path)
)


@click.command()
@_run_argument
@click.option("--round", "number", type=count(), required=True, help="Which round.")
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    metavar="PATH.PY:NAME",
    help="A codec from a file, as given to the coordinator by --compress.",
)
@click.option(
    "--strategy",
    metavar="NAME|path.py:name",
    help="The run's strategy, if its file has moved.  [default: as in run.json]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one object with every tensor.")
def replay(
    folder: Path, number: int, codecs: tuple[str, ...], strategy: str | None, as_json: bool
) -> None:
    """Average a round's kept updates again, and compare the result.

    RUN is the run's folder, such as runs/letters, of a coordinator that ran with --keep-updates.
    The updates of the round go through the checks of the coordinator and the run's strategy again,
    in the order in which they were counted, from the model of the round before; the result is
    compared with what was committed, bit by bit. Beside it, for federated averaging, the average as
    plain NumPy computes it says whether the average itself is right: being summed in another order,
    it may be a last bit away.

    Exit code 0: equal to what was committed; 1: different; 2: something is missing or damaged.

    \b
      fluffle coordinator --federation letters --keep-updates
      fluffle replay runs/letters --round 3
    """
    from fluffle_common.cli.loading import load_codec
    from fluffle_coordinator.storage.replay import replay as compute_again

    for codec in codecs:
        load_codec(codec, "--codec")
    found = compute_again(folder, number, _strategy(folder, number, strategy))
    if as_json:
        echo_json(found.as_json())
    else:
        _print(found)
    if not found.equal:
        sys.exit(_DIFFERENT)


def _strategy(folder: Path, number: int, given: str | None) -> Strategy[Any]:
    """Return the strategy that made a round; ``given`` says where it is now."""
    from fluffle_coordinator.service.guarded_strategy import GuardedStrategy
    from fluffle_coordinator.service.strategy_loading import load_strategy
    from fluffle_coordinator.storage.replay import strategy_of

    name, file = strategy_of(folder, number)
    recorded = f"{file}:{name.rpartition(':')[2]}" if file else name
    named = load_strategy(given or recorded)
    if named.name != name:
        raise UsageError(
            f"round {number} of {folder} was made with the strategy {name}, not with {named.name}; "
            "name that one with --strategy"
        )
    if not named.strategy.needs.repeatable:
        raise UsageError(
            f"round {number} of {folder} was made with random noise that is not kept ({name}), "
            "so it cannot be computed again"
        )
    return GuardedStrategy(named, number)


def _print(found: Replay) -> None:
    rows = table()
    heads = ["tensor", "dtype", "shape", "committed"]
    if found.tensors[0].second_opinion:
        heads.append("plain NumPy")
    for name in heads:
        rows.add_column(name, overflow="fold")
    for tensor in found.tensors:
        shape = " x ".join(map(str, tensor.shape)) or "()"
        verdicts = [_words(one) for one in (tensor.replayed, tensor.second_opinion) if one]
        rows.add_row(tensor.name, tensor.dtype, shape, *verdicts)
    screen().print(rows)
    who = ", ".join(f"{worker} ({examples})" for worker, examples in found.participants)
    echo_sentences(
        f"round {found.round} of run {found.run}, averaged again from the kept updates of {who} "
        f"and compared with {found.checkpoint}"
    )
    wrong = [tensor.name for tensor in found.tensors if not tensor.replayed.equal]
    if wrong:
        echo(
            f"DIFFERENT: {len(wrong)} of {len(found.tensors)} tensors are not what was committed: "
            + ", ".join(wrong)
        )
    else:
        echo(f"equal: all {len(found.tensors)} tensors are, bit by bit, what was committed")


def _words(distance: Distance) -> str:
    if distance.equal:
        return "equal"
    values = "value differs" if distance.different == 1 else "values differ"
    return (
        f"{distance.different:,} {values}, at most {distance.largest:.3g} "
        f"({distance.ulps:,} ulp{'s' if distance.ulps != 1 else ''})"
    )


@click.command()
@_run_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="HTML",
    help="Where to write the page.  [default: report.html in the run's folder]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the data of the page instead.")
def report(folder: Path, out: Path | None, as_json: bool) -> None:
    """Write a run as one page, to keep or to send.

    The page needs nothing else. It is the live page as the run left it, drawn by the JavaScript in
    it, without a network: the curves, who took part in which round, where the time went, what was
    late or rejected and why, how the run was configured, its versions, and its checkpoints with
    their SHA-256. RUN is the run's folder, such as runs/letters; the run may still be going on.

    \b
      fluffle report runs/letters --out report.html
    """
    from fluffle_common.durable_files import replacing
    from fluffle_coordinator.dashboard.report import page, read_report

    shown = read_report(folder, time.time())
    if as_json:
        echo_json(shown)
        return
    out = out or folder / "report.html"
    try:
        with replacing(out) as file:
            file.write(page(shown).encode())
    except OSError as why:
        raise RunError(f"cannot write {out} ({why.strerror})") from None
    echo(f"report written to {out}")
