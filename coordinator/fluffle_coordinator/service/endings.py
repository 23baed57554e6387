"""What to do next: the sentence that goes with every end of a run, naming the command for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fluffle_common.tensors.weights import Array
from fluffle_coordinator.machine.state import State


def after_the_end(folder: Path, rounds: int) -> str:
    """Say what a finished run offers.

    >>> after_the_end(Path("runs/letters"), 6)
    "'fluffle history --run runs/letters' shows the rounds; start the coordinator again with \
--rounds 12 (without --fresh) to add more, or with --fresh for a new run"
    """
    return (
        f"'fluffle history --run {shlex.quote(str(folder))}' shows the rounds; start the "
        f"coordinator again with --rounds {2 * rounds} (without --fresh) to add more, or with "
        "--fresh for a new run"
    )


def after_an_early_end(folder: Path, committed: int) -> str:
    """Say how a run goes on that was ended, by its own hook, before all rounds were done.

    >>> after_an_early_end(Path("runs/letters"), 3)
    "'fluffle history --run runs/letters' shows the rounds; the same command (without --fresh) \
goes on with round 4"
    """
    return (
        f"'fluffle history --run {shlex.quote(str(folder))}' shows the rounds; the same command "
        f"(without --fresh) goes on with round {committed + 1}"
    )


def done_already(folder: Path, committed: int, rounds: int) -> str:
    """Say that a run has nothing left to do when it is started again.

    >>> done_already(Path("runs/letters"), 6, 6)[:68]
    'the run in runs/letters is done: it has 6 rounds and --rounds is 6; '
    """
    return (
        f"the run in {folder} is done: it has {committed} round{'s'[: committed != 1]} and "
        f"--rounds is {rounds}; {after_the_end(folder, committed)}"
    )


def after_a_stop(state: State, folder: Path) -> str:
    """Say how a run that stopped early goes on.

    Workers that fail, or whose updates are refused, may have another model than the run: that run
    cannot be continued with it, whatever command is given.
    """
    same = f"the same command (without --fresh) goes on with round {state.committed + 1}"
    if state.failed or state.doubted:
        return (
            "if the model or the classes have changed since this run began, --fresh begins a "
            f"new run and moves the one in {folder} aside; otherwise, once the workers are "
            f"fixed, {same}"
        )
    return f"once that is fixed, {same}"


def other_beginning(
    file: Path,
    first: Mapping[str, Array],
    given: Mapping[str, Array],
    *,
    same_frozen: bool = True,
) -> str:
    """Say that ``--init`` names other weights than a run began with; "" where they are the same."""
    same = (
        same_frozen
        and first.keys() == given.keys()
        and all(
            first[name].dtype == given[name].dtype
            and first[name].shape == given[name].shape
            and np.array_equal(bits(first[name]), bits(given[name]))
            for name in first
        )
    )
    if same:
        return ""
    return (
        f"--init {file} holds other weights than this run began with, and cannot change a run "
        "that exists; --fresh begins a new run with them and moves this one aside, and without "
        "--init this run goes on"
    )


def bits(tensor: Array) -> Array:
    """Return a tensor as bytes, so that NaN equals itself and every dtype can be compared."""
    return np.frombuffer(tensor.tobytes(), np.uint8)
