"""The run folder: checkpoints, the history, and the state to go on from after a crash.

::

    runs/letters/
        run.json                  the run's id, and its configurations
        history.jsonl             a line for each commit, for each evaluation and for the end
        frozen-….safetensors      the model's frozen tensors, if the workers share them
        round-0000.safetensors    the first weights, then one file per round, or with
                                  --keep-checkpoints only for the newest rounds
        best.safetensors          with --monitor: the best of them
        updates/round-0001/       with --keep-updates: a round's updates (see ``update_archive``)
        journal.jsonl             of a simulation: its journal (see ``observe.journal_file``)
        sampling.secret           if a strategy needs secret samples (see ``sampling_secret``)
        lock                      held by the coordinator that writes here, and names it

Files are written under a temporary name and then renamed, so each is complete. (After a power
failure, a checkpoint may be incomplete, but then no history line names it.) A round is committed
when its history line is on disk, which is written after its checkpoint. A function that writes one
of these files raises ``OSError`` if the disk refuses; the file is then unchanged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from fluffle_common.cli.console import finite
from fluffle_common.durable_files import make_folder, replacing, sync_folder
from fluffle_common.errors import RunError, UsageError
from fluffle_common.tensors.checkpoint import (
    Checkpoint,
    checkpoint_name,
    read_metadata,
    save_checkpoint,
)
from fluffle_common.tensors.frozen import IN_METADATA, NO_FROZEN, Frozen, read_frozen, save_frozen
from fluffle_common.tensors.weights import Array, Weights
from fluffle_coordinator.storage import update_archive
from fluffle_coordinator.storage.history import History
from fluffle_coordinator.storage.run_checkpoints import checkpoint_files, last_intact
from fluffle_coordinator.storage.run_file import (
    RUN_FILE,
    add_configuration,
    read_run_file,
    write_run_file,
)
from fluffle_coordinator.strategy.base import NO_TENSORS
from fluffle_coordinator.strategy.fedavg import FEDAVG

# Everything that a run writes, except the lock.
_RUN_FILES = (
    RUN_FILE,
    "history*.jsonl",
    "frozen-*.safetensors",
    "round-*.safetensors",
    "best.safetensors",
    "updates",
    "journal.jsonl",
    "sampling.secret",
)
_UNFINISHED = tuple(f"{name}.partial" for name in _RUN_FILES)  # left by a crash


def new_base() -> str:
    """Return a new, unique name for weights."""
    return secrets.token_hex(6)


@dataclass(frozen=True)
class Saved:
    """The state of a run on disk; the defaults are those of a new run."""

    run: str  # its id
    lines: Sequence[Mapping[str, Any]] = ()  # of its history
    committed: int = 0  # the last committed round; 0 for none

    # The name of the weights that each round began with.
    earlier: Mapping[int, str] = field(default_factory=dict)

    evaluated: bool = True  # whether the last model's evaluation is in the history
    weights: dict[str, Array] | None = None  # of the last model; None if there is none yet
    metadata: dict[str, str] = field(default_factory=dict)  # of its checkpoint
    repairs: tuple[str, ...] = ()  # descriptions of what was repaired
    strategy: str = FEDAVG.name  # the one that made the last model
    kept: Mapping[str, Array] = field(default_factory=dict)  # the state that it saved with that
    frozen: Frozen = NO_FROZEN  # the frozen tensors of the model

    @property
    def base(self) -> str:
        """The name of the weights; empty if there are none yet."""
        return self.metadata.get("base", "")


class RunStore:
    """The folder of a run, which is created if it does not exist.

    Attributes:
        folder: its absolute path, so that a user's code may change the working directory.
        shown: its path as given, for messages.

    Raises:
        RunError: if it cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.shown = folder.absolute(), folder
        self.history = History(self.folder)
        self._lock: IO[bytes] | None = None
        try:
            make_folder(folder)
        except OSError as error:
            raise RunError(
                f"cannot make the run folder {folder} ({error.strerror}); choose another folder "
                "with --run"
            ) from None

    def try_lock(self) -> bool:
        """Lock the folder; return False if another coordinator holds the lock.

        Raises:
            OSError: if the lock cannot be opened, or the file system has no locks.
            RunError: if the lock is not a regular file.
        """
        if self._lock is not None:
            return True
        self._check_regular(["lock"])
        lock = (self.folder / "lock").open("ab+", buffering=0)  # not "w": keep another's name
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as why:
            lock.close()
            if isinstance(why, BlockingIOError):
                return False
            raise  # the file system has no locks
        self._lock = lock
        with contextlib.suppress(OSError):  # a full disk takes the lock, but not the name
            lock.truncate(0)
            lock.write(this_process().encode())
        return True

    def holder(self) -> str:
        """Return which process last locked the folder; empty if it left no name."""
        try:
            return (self.folder / "lock").read_bytes()[:200].decode(errors="replace")
        except OSError:
            return ""

    def unlock(self) -> None:
        """Release the lock, as the end of the process does too."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child that was forked has the file open, too
            self._lock.close()
            self._lock = None

    def start_afresh(self) -> Path | None:
        """Move an earlier run to a new folder, and return that; None if there was no run.

        Other files in the folder stay there: it may be somebody's working directory.
        """
        earlier = self._files((*_RUN_FILES, *_UNFINISHED))
        if not earlier:
            return None
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        for folder in (aside, aside.parent, self.folder):
            sync_folder(folder)
        return aside

    def _check_regular(self, patterns: Iterable[str]) -> None:
        """Raise ``RunError`` if one of these files is something else; a pipe, say, would block."""
        for path in self._files(patterns):
            if path.exists() and not path.is_file():
                raise RunError(
                    f"{path} is not a regular file; move it elsewhere, and run the same command "
                    "again"
                )

    def _files(self, patterns: Iterable[str]) -> list[Path]:
        return sorted({path for pattern in patterns for path in self.folder.glob(pattern)})

    def load(self, federation: str) -> Saved:
        """Read the state of the run, and repair what a crash has damaged.

        Raises:
            RunError: if the folder holds another federation's run, or no readable checkpoint, or
                if ``run.json`` or lines of the history were removed.
        """
        self._check_regular(name for name in _RUN_FILES if name != "updates")
        for leftover in self._files(_UNFINISHED):
            leftover.unlink()
        identity = self._identity(federation)
        sync_folder(self.folder)  # a crash may have left renamed files that are not on disk
        lines, incomplete = self.history.read()
        committed = {line["round"]: line for line in lines if line["event"] == "committed"}
        self._check_complete(identity, committed)
        last, checkpoint, damage = self._newest_intact(identity, committed)
        frozen = self._frozen(checkpoint) if checkpoint else NO_FROZEN
        repairs = []  # all checks have passed: from here on, files are changed
        if incomplete:
            self.history.cut_off(incomplete)
            repairs.append("removed an incomplete last line from history.jsonl")
        if last < max(committed, default=0):
            self.history.forget_after(last, lines)
            repairs.append(
                f"{damage}; continuing from the newest intact checkpoint, which belongs to round "
                f"{last}"
            )
            lines = [line for line in lines if line["round"] <= last]
        update_archive.forget_uncommitted(self.folder, last)
        return Saved(
            run=identity,
            lines=lines,
            committed=last,
            earlier=self._bases(line for line in committed.values() if line["round"] <= last),
            evaluated=not last
            or any(x["event"] == "evaluated" and x["round"] == last for x in lines),
            weights=checkpoint.weights if checkpoint else None,
            metadata=checkpoint.metadata if checkpoint else {},
            repairs=tuple(repairs),
            strategy=committed.get(last, {}).get("strategy", FEDAVG.name),
            kept=checkpoint.strategy_state if checkpoint else {},
            frozen=frozen,
        )

    def _newest_intact(
        self, identity: str, committed: Mapping[int, dict[str, Any]]
    ) -> tuple[int, Checkpoint | None, str]:
        """Return what ``last_intact`` does for the newest round, if the run can go on from there.

        Raises:
            RunError: if no checkpoint is intact, or a private round would have to be repeated.
        """
        newest = max(committed, default=0)
        bases = {number: line["base"] for number, line in committed.items()}
        last, checkpoint, damage = last_intact(self.folder, newest, identity, bases)
        if checkpoint is None and (committed or (self.folder / checkpoint_name(0)).exists()):
            raise RunError(
                f"no checkpoint in {self.shown} is intact ({damage}); start a new run with --fresh"
            )
        if any("epsilon" in committed[number] for number in range(last + 1, newest + 1)):
            raise RunError(
                f"{damage}; repeating the round would send workers a second model of this round, "
                "which epsilon does not cover; restore the file, or start a new run with --fresh"
            )
        return last, checkpoint, damage

    def _frozen(self, checkpoint: Checkpoint) -> Frozen:
        try:
            return read_frozen(self.folder, checkpoint.metadata.get(IN_METADATA, ""))
        except UsageError as why:
            raise RunError(f"{why}, or start a new run with --fresh") from None

    def _bases(self, committed: Iterable[dict[str, Any]]) -> dict[int, str]:
        """Return the names of the weights that each round began with, as far as they are known."""
        bases = {line["round"] + 1: line["base"] for line in committed}
        with contextlib.suppress(UsageError, KeyError):
            bases[1] = read_metadata(self.folder / checkpoint_name(0))["base"]
        return bases

    def save_weights(
        self, number: int, weights: Weights, metadata: dict[str, str], kept: Weights = NO_TENSORS
    ) -> Path:
        """Write the checkpoint of a round, with the state that its strategy keeps."""
        path = self.folder / checkpoint_name(number)
        # A power failure may leave an incomplete checkpoint of a later round, which is not read:
        # no history line names it.
        save_checkpoint(path, weights, metadata, kept, named_first=number > 0)
        return path

    def save_first(self, weights: Weights, metadata: dict[str, str], frozen: Frozen) -> None:
        """Write the first weights, after the frozen tensors that belong to them."""
        if frozen.digest:
            save_frozen(self.folder, frozen)
            metadata = {**metadata, IN_METADATA: frozen.digest}
        self.save_weights(0, weights, metadata)

    def note_configuration(self, configuration: dict[str, Any], committed: int) -> None:
        """Add a configuration to run.json, from the round after ``committed`` on, if it is new."""
        run = read_run_file(self.folder)
        if add_configuration(run, finite(configuration), committed):
            write_run_file(self.folder, run)

    def _identity(self, federation: str) -> str:
        path = self.folder / RUN_FILE
        if path.exists():
            try:
                identity = read_run_file(self.folder)
                known, run = str(identity["federation"]), str(identity["run"])
            except (UsageError, KeyError):
                raise RunError(
                    f"{path} cannot be read; restore this file, or start a new run with --fresh"
                ) from None
            if known != federation:
                raise RunError(
                    f"{self.shown} holds a run of federation {known}, not {federation}; choose "
                    "another folder with --run, or move that run aside with --fresh"
                )
            return run
        if checkpoint_files(self.folder) or self.history.path.exists():
            raise RunError(
                f"{self.shown} holds a run, but run.json is missing; restore run.json, or move the "
                "run aside with --fresh"
            )
        run = secrets.token_hex(6)
        write_run_file(self.folder, {"run": run, "federation": federation})
        return run

    def _check_complete(self, run: str, committed: Mapping[int, dict[str, Any]]) -> None:
        """Check that the history, with these commits, is the run's and has not lost lines.

        A crash leaves at most one checkpoint without a line, and a repair only damaged ones.
        """
        for line in committed.values():
            if line["run"] != run:
                raise RunError(
                    f"in {self.shown}, history.jsonl belongs to run {line['run']}, but run.json "
                    f"belongs to run {run}; restore these files, or move the run aside with --fresh"
                )
        last, newest = (max(of, default=0) for of in (committed, checkpoint_files(self.folder)))
        if (missing := next(n for n in count(1) if n not in committed)) < last:
            raise RunError(
                f"in {self.shown}, history.jsonl has no line for the commit of round {missing}; "
                "restore history.jsonl, or move the run aside with --fresh"
            )
        if newest > last + 1 and last_intact(self.folder, newest, run, {})[0] > last + 1:
            known = f"ends at round {last}" if last else "has no committed round"
            raise RunError(
                f"{self.shown} holds the checkpoint of round {newest}, but history.jsonl {known}; "
                "restore history.jsonl, or move the run aside with --fresh"
            )


def this_process() -> str:
    """Return the process and its machine, in the words in which a standby names them."""
    return f"process {os.getpid()} on {platform.node()}"


def sampling_secret(folder: Path) -> int:
    """Return the secret of the run in a folder; the first call creates it.

    A run keeps its secret, so that a round that a crash interrupts asks the same sample again.

    Raises:
        RunError: if the file cannot be read or written.
    """
    path = folder / "sampling.secret"
    try:
        if not path.exists():
            with replacing(path) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(f"{secrets.randbits(128):032x}\n".encode())
        return int(path.read_text(), 16)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}, which determines the selected workers, cannot be used ({error}); restore "
            "this file, or start a new run with --fresh"
        ) from None
