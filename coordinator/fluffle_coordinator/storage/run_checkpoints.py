"""The checkpoints in a run folder: which a run can go on from, which is the best, which may go."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from fluffle_common.errors import UsageError
from fluffle_common.tensors.checkpoint import Checkpoint, checkpoint_name, read_whole

_CHECKPOINT = re.compile(r"round-(\d+)\.safetensors")  # see ``checkpoint_name``
BEST = "best.safetensors"


def checkpoint_files(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of all rounds that have one, intact or not, by round, in order."""
    named = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(name[1]), path) for name, path in named if name))


def last_intact(
    folder: Path, last: int, run: str, bases: Mapping[int, str]
) -> tuple[int, Checkpoint | None, str]:
    """Return the newest checkpoint that can be read and belongs where it is, with its round.

    The search goes backwards from round ``last``. ``bases`` has the name of each round's weights,
    as far as the history has it. What is wrong with the checkpoint of round ``last`` comes third,
    empty if it is intact. If no checkpoint is intact, the result is ``(0, None, why)``.

    Raises:
        OSError: if a checkpoint is there but cannot be opened, which says nothing about damage.
    """
    why = ""
    there = {number for number in checkpoint_files(folder) if number < last}
    for number in sorted({last, *there}, reverse=True):
        path = folder / checkpoint_name(number)
        with contextlib.suppress(FileNotFoundError), path.open("rb"):
            pass
        try:
            checkpoint = read_whole(path)
            _check_place(path, checkpoint.metadata, number, run, bases.get(number))
        except UsageError as wrong:
            why = why or str(wrong)
        else:
            return number, checkpoint, why
    return 0, None, why


def _check_place(
    path: Path, metadata: Mapping[str, str], number: int, run: str, base: str | None
) -> None:
    """Check that a file holds its own round; ``UsageError`` if it is a copy of another one's."""
    of_round, of_run, of_base = (metadata.get(name) for name in ("round", "run", "base"))
    if (of_round, of_run) != (str(number), run):
        raise UsageError(
            f"{path} holds round {of_round} of run {of_run}, not round {number} of run {run}"
        )
    if base not in (None, of_base):
        raise UsageError(
            f"{path} holds weights with the base {of_base}, but history.jsonl names the "
            f"base {base} for round {number}"
        )


def remove_old(folder: Path, last: int, keep: int) -> None:
    """Remove all checkpoints but the first weights and those of the ``keep`` rounds up to ``last``.

    The first weights stay because ``--init`` is compared with them.
    """
    for number, path in checkpoint_files(folder).items():
        if 0 < number <= last - keep:
            path.unlink(missing_ok=True)


def keep_best(folder: Path, number: int) -> None:
    """Make ``best.safetensors`` the checkpoint of this round."""
    checkpoint, best = folder / checkpoint_name(number), folder / BEST
    if best.exists() and best.samefile(checkpoint):
        return  # to rename a hard link to another of the same file does nothing
    partial = folder / f"{BEST}.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(checkpoint, partial)  # safe, since a checkpoint is never written to again
    except OSError:  # the file system has no hard links
        shutil.copyfile(checkpoint, partial)
    os.replace(partial, best)
