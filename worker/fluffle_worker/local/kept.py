"""What a worker keeps from round to round, in memory and in its state folder.

::

    runs/workers/letters/client-1/
        local-rule-0007.safetensors    what its local rule kept in round 7
        local-rule-0006.safetensors    a round that is trained again needs what the one before kept
        personal-0007.safetensors      the tensors that its task does not send

A file is on disk, whole, before the update of its round is sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fluffle_common.durable_files import make_folder
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.checkpoint import read_checkpoint, save_checkpoint
from fluffle_common.tensors.layout import Weights, check_signature
from fluffle_worker.local.base import Named

_ROUNDS_KEPT = 2


class _Kept(NamedTuple):
    run: str
    round: int
    arrays: Weights


class KeptTensors:
    """The tensors of the last rounds of a run.

    Args:
        folder: where they are kept; None: in memory only.
        whose: what the files are called.

    Raises:
        TaskError: from any method, if the disk refuses or a file is damaged.
    """

    def __init__(self, folder: Path | None = None, whose: str = "local-rule") -> None:
        self._folder, self._whose = folder, whose
        self._rounds: list[_Kept] | None = None if folder else []

    def before(self, run: str, number: int) -> Weights:
        """Return what was kept in the last round of ``run`` before this one; none at first."""
        before = [one for one in self._known() if one.run == run and one.round < number]
        return max(before, key=lambda one: one.round).arrays if before else {}

    def latest(self) -> Weights:
        """Return what was kept last."""
        known = self._known()
        return max(known, key=lambda one: one.round).arrays if known else {}

    def keep(self, run: str, number: int, arrays: Named) -> None:
        """Keep tensors as those of a round; an empty mapping keeps nothing of it.

        Raises:
            ValueError: if one of them is no array that can be kept.
        """
        found = {name: np.array(array) for name, array in arrays.items()}
        if found:
            check_signature(found)
        known = self._known()
        # A run that went back to an earlier round has no use for what was kept after that.
        before = [one for one in known if one.run == run and one.round < number]
        self._rounds = [*before, _Kept(run, number, found)][-_ROUNDS_KEPT:]
        if self._folder is not None and (found or any(one.arrays for one in known)):
            self._write(self._folder, run, number, found)

    def _known(self) -> list[_Kept]:
        if self._rounds is None:
            assert self._folder is not None
            self._rounds = [_read(path) for path in self._files(self._folder)]
        return self._rounds

    def _write(self, folder: Path, run: str, number: int, found: Weights) -> None:
        path = folder / self._name(number)
        try:
            make_folder(folder)
            if found:
                save_checkpoint(path, found, {"run": run, "round": str(number)})
            else:
                path.unlink(missing_ok=True)
            still = {self._name(one.round) for one in self._known() if one.arrays}
            for other in self._files(folder):
                if other.name not in still:
                    other.unlink(missing_ok=True)
        except OSError as why:
            raise TaskError(
                f"what the worker keeps cannot be written to {path} ({why.strerror}); make "
                "room there, or name another folder by --state-dir"
            ) from None

    def _name(self, number: int) -> str:
        return f"{self._whose}-{number:04d}.safetensors"

    def _files(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"{self._whose}-*.safetensors"))


def keep_in(folder: Path | None, task: Any) -> None:
    """Let a task, and its local rule, keep what they keep in a folder too, if there is one.

    Both may have a method ``keep_in(folder)``; most tasks keep nothing.
    """
    if folder is None:
        return
    for one in (task, getattr(task, "local_rule", None)):
        keeps = getattr(one, "keep_in", None)
        if callable(keeps):
            keeps(folder)


def _read(path: Path) -> _Kept:
    try:
        arrays, metadata = read_checkpoint(path)
        return _Kept(metadata["run"], int(metadata["round"]), arrays)
    except (UsageError, KeyError, ValueError) as wrong:
        raise TaskError(
            f"what the worker kept is damaged: {wrong}; remove {path} to go on without it"
        ) from None
