"""A run on disk: checkpoints, the history, and what is needed to go on after a crash.

::

    runs/letters/
        run.json                  the run's id, and how it was started, each time that changed
        history.jsonl             a line when a round is committed, when it is evaluated, and when
                                  the run ends
        round-0000.safetensors    the first weights, then one file a round
        best.safetensors          with --monitor: the best of them
        updates/round-0001/       with --keep-updates: what was averaged (see ``update_archive``)
        sampling.secret           if a strategy needs secret samples (see ``sampling_secret``)
        lock                      held by the coordinator that writes here

A file is written beside its final name and then renamed, so that a name stands for a whole file;
only if the power fails, a checkpoint that no history line names may be in part. A round is
committed when its history line is on disk, which is after its checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fluffle_common.clock import timestamp
from fluffle_common.durable_files import make_folder, replacing, sync_folder
from fluffle_common.errors import RunError, UsageError
from fluffle_common.tensors.checkpoint import (
    Checkpoint,
    checkpoint_name,
    read_metadata,
    read_whole,
    save_checkpoint,
)
from fluffle_common.tensors.weights import Array, Weights
from fluffle_common.transport.base import Body
from fluffle_coordinator.machine.state import Ticket
from fluffle_coordinator.storage import update_archive
from fluffle_coordinator.storage.history import History
from fluffle_coordinator.strategy.base import NO_TENSORS
from fluffle_coordinator.strategy.fedavg import FEDAVG


@dataclass(frozen=True)
class Saved:
    """Where a run on disk stands; ``committed`` 0 and ``weights`` None for a new one.

    ``strategy`` made the last committed round, and ``kept`` is what it kept of its state there.
    ``base`` names the weights, and ``earlier`` those that each round began with. ``announced`` is
    how many examples each worker counted with at most, ``counted`` the tickets of each round, and
    ``sequence`` the highest of all. ``asked_in`` is the last round that each worker was asked in,
    ``train_s`` how long its last training took.
    """

    run: str
    committed: int = 0
    announced: Mapping[str, int] = field(default_factory=dict)
    counted: Mapping[int, frozenset[Ticket]] = field(default_factory=dict)
    sequence: int = 0
    earlier: Mapping[int, str] = field(default_factory=dict)
    asked_in: Mapping[str, int] = field(default_factory=dict)
    train_s: Mapping[str, float] = field(default_factory=dict)
    evaluated: bool = True
    weights: dict[str, Array] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    strategy: str = FEDAVG.name
    kept: Mapping[str, Array] = field(default_factory=dict)

    @property
    def participants(self) -> frozenset[str]:
        """Who took part in the last committed round."""
        return frozenset(ticket.worker for ticket in self.counted.get(self.committed, ()))

    @property
    def base(self) -> str:
        """What the weights are named; a checkpoint of an earlier version has no name in it."""
        return self.metadata.get("base", "unnamed")


def new_base() -> str:
    """Name weights that were just made; no other weights have this name."""
    return secrets.token_hex(6)


def _most_examples(lines: Iterable[dict[str, Any]]) -> dict[str, int]:
    most: dict[str, int] = {}
    for one in (one for line in lines for one in line["participants"]):
        most[one["worker"]] = max(one["num_examples"], most.get(one["worker"], 0))
    return most


def _tickets(line: dict[str, Any]) -> frozenset[Ticket]:
    """Return what is counted in a round; a line of an earlier version names no sequence."""
    return frozenset(
        Ticket(one["worker"], one.get("sequence", line["round"])) for one in line["participants"]
    )


class RunStore:
    """The folder of one run.

    Args:
        folder: made where it is missing.

    Raises:
        RunError: where it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History(folder)
        self._lock: IO[str] | None = None
        try:
            make_folder(folder)
        except OSError as why:
            raise RunError(
                f"cannot make the run folder {folder} ({why.strerror}); choose another with --run"
            ) from None

    def try_lock(self) -> bool:
        """Take the folder for this store; False where another coordinator has it."""
        if self._lock is not None:
            return True
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        except OSError:  # a file system without locks
            lock.close()
            raise
        self._lock = lock
        return True

    def unlock(self) -> None:
        """Let another coordinator have the folder; the end of the process does that, too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def start_afresh(self) -> Path | None:
        """Move an earlier run out of the way; return where it is now, None where there was none."""
        kept = [path for path in self.folder.iterdir() if path.name != "lock"]
        if not kept:
            return None
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for path in kept:
            path.rename(aside / path.name)
        for folder in (aside, aside.parent, self.folder):
            sync_folder(folder)
        return aside

    def load(self, federation: str) -> Saved:
        """Read where the run stands, and repair what a crash left half-done.

        Raises:
            RunError: where the folder holds another federation's run, or nothing sound is left.
        """
        for leftover in self.folder.glob("*.partial"):
            leftover.unlink()
        identity = self._identity(federation)
        sync_folder(self.folder)  # of which a crash may have left names that are not on disk
        lines, repairs = self.history.mend()
        committed = {line["round"]: line for line in lines if line["event"] == "committed"}
        last, sound = self._last_sound(max(committed, default=0))
        if sound is None and (committed or (self.folder / checkpoint_name(0)).exists()):
            raise RunError(f"no checkpoint in {self.folder} can be read; --fresh starts a new run")
        if last < max(committed, default=0):
            self.history.forget_after(last, lines)
            repairs.append(f"the checkpoint after round {last} cannot be read: going on from there")
            lines = [line for line in lines if line["round"] <= last]
        update_archive.forget_uncommitted(self.folder, last)
        line = committed.get(last, {})
        commits = [x for x in lines if x["event"] == "committed"]
        counted = {x["round"]: _tickets(x) for x in commits}
        return Saved(
            run=identity,
            committed=last,
            announced=_most_examples(commits),
            counted=counted,
            sequence=max((t.sequence for some in counted.values() for t in some), default=0),
            earlier=self._bases(commits),
            asked_in={name: x["round"] for x in commits for name in x.get("asked", ())},
            train_s={
                one["worker"]: one["seconds"]
                for x in commits
                for one in x["participants"]
                if one.get("seconds") is not None
            },
            evaluated=not last
            or any(x["event"] == "evaluated" and x["round"] == last for x in lines),
            weights=sound.weights if sound else None,
            metadata=sound.metadata if sound else {},
            repairs=tuple(repairs),
            strategy=line.get("strategy", FEDAVG.name),
            kept=sound.strategy_state if sound else {},
        )

    def _bases(self, committed: Iterable[dict[str, Any]]) -> dict[int, str]:
        """Return what the weights are named that each round began with, if that is known."""
        bases = {line["round"] + 1: line["base"] for line in committed if "base" in line}
        with contextlib.suppress(UsageError):
            bases[1] = read_metadata(self.folder / checkpoint_name(0)).get("base", "unnamed")
        return bases

    def save_weights(
        self,
        number: int,
        weights: Weights,
        metadata: dict[str, str],
        kept: Weights = NO_TENSORS,
    ) -> Path:
        """Write the checkpoint of a round, whole or not at all, with what its strategy keeps.

        Raises:
            OSError: where the disk refuses; an earlier file of that name is as it was.
        """
        path = self.folder / checkpoint_name(number)
        # What a power failure may leave of a later one is passed over: no history line names it.
        save_checkpoint(path, weights, metadata, kept, named_first=number > 0)
        return path

    def keep_update(
        self,
        number: int,
        place: int,
        worker: str,
        body: Body,
        payload: Iterable[memoryview] | None,
    ) -> None:
        """Keep an update that is in the sum of round ``number``; see ``update_archive``.

        Raises:
            OSError: where the disk refuses; no file stands for half an update.
        """
        update_archive.keep_update(
            update_archive.update_path(self.folder, number, place, worker), body, payload
        )

    def note_configuration(self, configuration: dict[str, Any], committed: int) -> None:
        """Add to run.json how the run goes on from here, unless that is as it was.

        Args:
            configuration: what JSON can hold.
            committed: the last committed round; it holds from the next one on.

        Raises:
            RunError: where the disk refuses.
        """
        path = self.folder / "run.json"
        told = json.loads(path.read_text())
        before = told.setdefault("configurations", [])
        new = json.loads(json.dumps(configuration))
        if before and {**before[-1], **new} == before[-1]:
            return
        before.append({"from_round": committed + 1, "since": timestamp(), **new})
        try:
            with replacing(path) as file:
                file.write(json.dumps(told, indent=1).encode() + b"\n")
        except OSError as why:
            raise RunError(f"cannot write {path} ({why.strerror})") from None

    def _identity(self, federation: str) -> str:
        path = self.folder / "run.json"
        if path.exists():
            try:
                told = json.loads(path.read_text())
                known, run = str(told["federation"]), str(told["run"])
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path} cannot be read; --fresh starts a new run") from None
            if known != federation:
                raise RunError(
                    f"{self.folder} holds a run of federation {known}, "
                    f"not {federation}; choose another folder with --run, or --fresh"
                )
            return run
        run = secrets.token_hex(6)
        with replacing(path) as file:
            file.write(json.dumps({"run": run, "federation": federation}).encode() + b"\n")
        return run

    def _last_sound(self, last: int) -> tuple[int, Checkpoint | None]:
        for number in range(last, -1, -1):
            path = self.folder / checkpoint_name(number)
            if path.exists():
                with contextlib.suppress(UsageError):
                    return number, read_whole(path)
        return 0, None
