"""Tensors that a worker keeps between rounds, in memory and in its state folder.

::

    runs/workers/letters/client-1/
        local-rule-0007.safetensors    kept by the local rule in round 7
        local-rule-0006.safetensors    kept in round 6; needed if round 7 is trained again
        local-rule-0005.safetensors    kept in round 5; needed if a damaged checkpoint of round 6
                                       takes the run back to that round
        personal-0007.safetensors      tensors that the task does not send
        owner.txt                      whose folder it is, if the data owner chose it

The number is the sequence of the work's ticket: in synchronous rounds, the round. A file is
completely written before the update of its round is sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fluffle_common.cli.console import warn
from fluffle_common.cli.user_code import call_task
from fluffle_common.durable_files import make_folder, open_regular
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.checkpoint import read_checkpoint, save_checkpoint
from fluffle_common.tensors.layout import Weights, check_signature
from fluffle_worker.local.base import Named

WorkId = tuple[str, int, int]
"""The run, the round and the sequence of a piece of work; an asynchronous round can have several.
"""
# Without a folder, a worker ends with its coordinator, so the run cannot go back during its life.
_KEPT_IN_FOLDER, _KEPT_IN_MEMORY = 3, 2
_OWNER = "owner.txt"


class _Kept(NamedTuple):
    run: str
    round: int
    sequence: int
    arrays: Weights
    order: int  # grows with each piece of work

    def precedes(self, work: WorkId) -> bool:
        """Whether its work came before ``work``, which may be a repetition.

        A higher sequence is later work, even if an asynchronous run went back a round. If the run
        becomes synchronous, the sequence starts anew: it is then the number of the round.
        """
        _, number, sequence = work
        becomes_synchronous = sequence == number and self.sequence != self.round
        earlier = (self.round, self.sequence) < (number, sequence)
        return earlier or self.sequence < sequence or becomes_synchronous


class PersistentTensors:
    """The tensors of a worker's last three pieces of work for a run.

    Every method raises ``TaskError`` if a file cannot be read or written.

    Without a folder, there are only two, in memory. The files' names begin with ``prefix``.
    """

    def __init__(self, folder: Path | None = None, prefix: str = "local-rule") -> None:
        self._folder, self._prefix = folder, prefix
        self._rounds: list[_Kept] | None = None if folder else []
        self._most = _KEPT_IN_FOLDER if folder else _KEPT_IN_MEMORY

    def before(self, work: WorkId) -> Weights:
        """Return the tensors of the run's last work before this one; empty if none.

        If the run went back further than the tensors do, warn, and return the oldest of them.
        """
        ours = [kept for kept in self._all() if kept.run == work[0]]
        earlier = [kept for kept in ours if kept.precedes(work)]
        if earlier:
            return earlier[-1].arrays
        if len(ours) < self._most or not ours[0].arrays:  # no older ones have been there
            return {}
        warn(
            f"the run went back to round {work[1]}, and the state that this worker kept before "
            f"that round ({self._prefix}) is no longer there; it continues with its oldest state, "
            f"of round {ours[0].round}"
        )
        return ours[0].arrays

    def latest(self, run: str = "") -> Weights:
        """Return the tensors of the last work of ``run``, or of any run if it is empty.

        Empty if there are none.
        """
        ours = [kept for kept in self._all() if run in ("", kept.run)]
        return ours[-1].arrays if ours else {}

    def keep(self, work: WorkId, arrays: Named) -> None:
        """Keep copies of the tensors of a piece of work; an empty mapping keeps nothing.

        Raises:
            ValueError: if one of them cannot be stored as an array.
        """
        copies = {name: np.array(array) for name, array in arrays.items()}
        if copies:
            check_signature(copies)
        previous = self._all()
        # If the run went back to an earlier round, the tensors of later rounds are obsolete.
        new = _Kept(*work, copies, max((kept.order for kept in previous), default=0) + 1)
        earlier = [
            kept
            for kept in previous
            if kept.run == new.run and kept.round <= new.round and kept.precedes(work)
        ]
        self._rounds = [*earlier, new][-self._most :]
        if self._folder is not None and (copies or any(kept.arrays for kept in previous)):
            self._write(self._folder, new)

    def _all(self) -> list[_Kept]:
        if self._rounds is None:
            assert self._folder is not None
            kept = [_read(path) for path in self._files(self._folder)]
            self._rounds = sorted(kept, key=lambda one: one.order)
        return self._rounds

    def _write(self, folder: Path, new: _Kept) -> None:
        path = folder / self._name(new)
        numbers = {"round": new.round, "sequence": new.sequence, "order": new.order}
        metadata = {"run": new.run, **{name: str(number) for name, number in numbers.items()}}
        try:
            make_folder(folder)
            if new.arrays:
                save_checkpoint(path, new.arrays, metadata)
            else:
                path.unlink(missing_ok=True)
            current = {self._name(kept) for kept in self._all() if kept.arrays}
            for other in self._files(folder):
                if other.name not in current:
                    other.unlink(missing_ok=True)
        except OSError as why:
            raise TaskError(
                f"the worker's state cannot be written to {path} ({why.strerror}); free disk "
                "space, or choose another folder with --state-dir"
            ) from None

    def _name(self, kept: _Kept) -> str:
        return f"{self._prefix}-{kept.sequence:04d}.safetensors"

    def _files(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"{self._prefix}-*.safetensors"))


def claim(folder: Path, owner: str) -> None:
    """Reserve a state folder for one worker; others would read and delete its files.

    Raises:
        UsageError: if the folder belongs to another worker, or cannot be written.
    """
    path = folder / _OWNER
    try:
        make_folder(folder)
        with open(path, "a+", encoding="utf-8", errors="replace", opener=open_regular) as file:
            file.seek(0)
            found = file.read().strip()
            if not found:
                file.write(f"{owner}\n")
    except OSError as why:
        raise UsageError(
            f"cannot use the state folder {folder} ({why.strerror}); choose another folder with "
            "--state-dir"
        ) from None
    if found not in ("", owner):
        raise UsageError(
            f"the state folder {folder} belongs to worker {found}, but this is worker {owner}; "
            f"give each worker its own --state-dir, or remove {path} if this worker has a new name"
        )


def keep_in(folder: Path | None, name: str, task: Any) -> None:
    """Call the method ``keep_in`` of a task and of its local rule, if they have one.

    Does nothing if there is no folder.

    Raises:
        TaskError: if one of them fails; ``name`` is the task's in the error.
    """
    if folder is None:
        return
    for owner in (task, getattr(task, "local_rule", None)):
        keep = getattr(owner, "keep_in", None)
        if callable(keep):
            call_task(f"keep_in() of the task {name} fails", keep, folder)


def _read(path: Path) -> _Kept:
    try:
        arrays, metadata = read_checkpoint(path)
        number, sequence, order = (int(metadata[name]) for name in ("round", "sequence", "order"))
        return _Kept(metadata["run"], number, sequence, arrays, order)
    except (UsageError, KeyError, ValueError) as wrong:
        raise TaskError(
            f"the worker's state is damaged: {wrong}; remove {path} to continue without this state"
        ) from None
