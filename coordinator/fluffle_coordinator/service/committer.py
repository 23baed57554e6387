"""The committer: writes and fsyncs checkpoints and history lines, strictly in order.

A round is committed once its history line is on disk, and the line is written after the checkpoint.
Only then does the machine receive ``Committed``, send the new weights and acknowledge the updates;
of large weights, only the last part waits (``Outbox.begin``). A crash at any earlier point
therefore loses no update: the broker delivers them again.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fluffle_common.clock import monotonic, real_sleep, timestamp
from fluffle_common.errors import RunError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.metric_names import add_test_prefix
from fluffle_common.tensors.checkpoint import checkpoint_name
from fluffle_common.tensors.frozen import Frozen, read_frozen
from fluffle_common.tensors.on_disk import map_to_disk
from fluffle_common.tensors.weights import Weights
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.early_stopping import Standing
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.serial_queue import SerialQueue
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage import round_stats, update_archive
from fluffle_coordinator.storage.run_checkpoints import keep_best, remove_old
from fluffle_coordinator.storage.run_store import RunStore, new_base
from fluffle_coordinator.user_code.hooks import Commit, HookCalls, copied

_T = TypeVar("_T")
_DISK_RETRY_S = 5.0
# Refusals that last until somebody changes the run folder or its permissions. A full disk or an I/O
# error of a file server may pass without that.
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_LASTING |= {errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Average:
    """A closed round and its new weights, ready to be committed."""

    number: int
    weights: Weights
    base: str  # their name
    asked: tuple[str, ...]
    participants: list[dict[str, Any]]  # the history's entry for each update, as they were folded
    clock: round_stats.Clock
    kept: Weights = field(default_factory=dict)  # the strategy's state for the checkpoint
    # The privacy budget that all rounds so far used; empty if the strategy does not count it.
    spent: Mapping[str, float] = field(default_factory=dict)


class NoRoom(RunError):
    """The disk refused a write, which can be repeated when there is room."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"cannot write to {folder} ({reason}); free disk space there and run the same command "
            "again (no update is lost)"
        )
        self.reason = reason


class Committer:
    """Writes everything that a run stores: checkpoints, history, kept updates, the best model.

    ``metadata`` returns the metadata of a round's checkpoint; ``lines`` is the history so far.
    """

    def __init__(
        self,
        store: RunStore,
        settings: CoordinatorSettings,
        *,
        metadata: Callable[[int], dict[str, str]],
        record: Callable[[run_events.RunEvent], None],
        post: Callable[[ev.Event], None],
        lines: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        hooks, stopping = settings.hooks, settings.stopping
        self.counts = round_stats.Counts()
        self._store, self._metadata, self._record, self._post = store, metadata, record, post
        self._strategy, self._rounds = settings.strategy.name, settings.rules.rounds
        self._keep_checkpoints = settings.keep_checkpoints
        if self._keep_checkpoints and stopping.monitor:  # the best may be evaluated so late
            still_evaluated = settings.schedule.max_staleness + 2
            self._keep_checkpoints = max(self._keep_checkpoints, still_evaluated)
        self._hooks, self._calls = hooks, HookCalls(hooks, record)
        self._stopping, self._best, self._warned = stopping, 0, False
        self._standing = Standing(stopping, lines)
        self.enough = self._standing.enough
        # The last evaluated round and its federated metrics.
        self._evaluated: tuple[int, dict[str, float]] = 0, {}
        for line in lines:
            if line["event"] == "evaluated" and line["round"] >= self._evaluated[0]:
                self._evaluated = line["round"], round_stats.evaluation_metrics(line)
        self._jobs = SerialQueue()
        self.run, self.drained = self._jobs.run, self._jobs.drained
        self._committed_at = monotonic()

    async def begin_with(self, weights: Weights, frozen: Frozen) -> tuple[str, Weights]:
        """Save the first weights as the checkpoint of round 0.

        Returns:
            Their base name, and the frozen tensors, which are in a file and no longer in memory.
        """
        base = new_base()
        metadata = {**self._metadata(0), "base": base}
        await self._on_disk(lambda: self._store.save_first(weights, metadata, frozen))
        parameters = sum(tensor.size for tensor in weights.values())
        self._record(run_events.FirstWeights(tensors=len(weights), parameters=parameters))
        on_disk = await asyncio.to_thread(read_frozen, self._store.folder, frozen.digest)
        return base, on_disk.tensors

    async def keep(self, place: int, held: Held, payload: Iterable[memoryview]) -> None:
        """Store a folded update, so that replay can repeat the sum.

        ``place`` is its place in the order of folding, from 1. The payload is written only if it
        arrived in parts; otherwise, the message's body holds it.
        """
        message, body = held.message, held.delivery.body
        path = update_archive.update_path(self._store.folder, held.into, place, message.worker)
        apart = None if message.transfer is None else payload
        await self._on_disk(lambda: update_archive.keep_update(path, body, apart))

    def lay_on_disk(self, delta: Weights) -> Weights:
        """Move an update of the open round to a file in the run folder; return views of the file.

        Raises:
            NoRoom: if the disk refuses.
            RunError: if the run folder was removed or cannot be written.
        """
        return self._write(lambda: map_to_disk(delta, self._store.folder))

    def commit(self, average: Average) -> None:
        """Commit a round; posts ``Committed``."""
        self._jobs.put(lambda: self._commit(average))

    def record_evaluation(self, number: int, evaluations: Mapping[str, rs.Evaluated]) -> None:
        """Write the federated evaluation of a round's model to the history."""
        self._jobs.put(lambda: self._record_evaluation(number, evaluations))

    def record_end(self, number: int, outcome: str, reason: str) -> None:
        """Write the run's outcome, and the updates that were not counted since the last commit."""
        line = {"event": "ended", "round": number, "outcome": outcome, "reason": reason}

        async def record() -> None:
            line.update(self._take_counts(), ended_at=timestamp())
            await self._on_disk(lambda: self._store.history.append(line))

        if number:
            self._jobs.put(record)

    async def _commit(self, average: Average) -> None:
        number, clock, base = average.number, average.clock, average.base
        metadata = {**self._metadata(number), "base": base}
        line: dict[str, Any] = {
            "event": "committed",
            "run": metadata["run"],
            "round": number,
            "base": base,
            "asked": average.asked,
            "participants": average.participants,
            "opened_at": clock.opened,
            **self._take_counts(),
            "checkpoint": checkpoint_name(number),
            "strategy": self._strategy,
        }
        personal = round_stats.personal_means(average.participants)
        line |= {**average.spent, **personal}

        def write() -> None:
            self._store.save_weights(number, average.weights, metadata, average.kept)
            line["timings"] = clock.timings(self._committed_at, monotonic())
            line["committed_at"] = timestamp()
            self._store.history.append(line)

        await self._on_disk(write)
        self._committed_at = monotonic()
        if average.spent:
            self._record(run_events.Privacy(round=number, **average.spent))
        if personal:
            self._record(run_events.Personal(round=number, metrics=personal))
        participants = round_stats.examples_by_worker(average.participants)
        self._standing.add_time(line["timings"])
        # Whoever trained from the model of a round has evaluated that model before, if ever.
        if not self._evaluated[0] and any(
            one.get("staleness", 0) < number - 1 for one in average.participants
        ):
            self._warn_if_missing({})
        enough = await self._call_hooks(number, average.weights, participants)
        enough = enough or self.enough()
        about = base, sum(participants.values()), line["timings"], enough
        self._post(ev.Committed(monotonic(), number, *about))
        if keep := self._keep_checkpoints:
            await self._on_disk(lambda: remove_old(self._store.folder, number, keep))

    async def _call_hooks(
        self, number: int, weights: Weights, participants: Mapping[str, int]
    ) -> str:
        """Call the hooks for a committed round; return the reason to end the run, or ""."""
        if not self._hooks:
            return ""
        weights = await asyncio.to_thread(copied, weights)
        test = await self._calls.test(number, weights)
        if test:
            measured = add_test_prefix(test)
            line = {"event": "tested", "round": number, **measured, "tested_at": timestamp()}
            await self._on_disk(lambda: self._store.history.append(line))
            await self._monitor(number, measured)
            self._record(run_events.Tested(round=number, metrics=test))
        commit = Commit(
            round=number,
            rounds=self._rounds,
            weights=weights,
            participants=participants,
            checkpoint=self._store.folder / checkpoint_name(number),
            test=test,
            evaluation=self._evaluated[1] if self._evaluated[0] == number - 1 else {},
        )
        return await self._calls.on_round(commit)

    async def _monitor(self, number: int, metrics: Mapping[str, float]) -> None:
        """Update the stopping rule with a round's metrics, and keep the model if it is the best."""
        self._standing.note(number, metrics)
        self._warn_if_missing(metrics)
        best = self._standing.best
        if self._stopping.monitor and best and best != self._best:
            if (self._store.folder / checkpoint_name(best)).exists():  # else it was deleted
                await self._on_disk(lambda: keep_best(self._store.folder, best))
            self._best = best

    def _warn_if_missing(self, metrics: Mapping[str, float]) -> None:
        missing = self._standing.missing(metrics)
        if missing and not self._warned:
            self._warned = True
            self._record(run_events.Unmeasured(what=missing))

    def _take_counts(self) -> dict[str, Any]:
        """Return and reset the counts of late and rejected updates."""
        counts, self.counts = self.counts, round_stats.Counts()
        return vars(counts)

    async def _record_evaluation(
        self, number: int, evaluations: Mapping[str, rs.Evaluated]
    ) -> None:
        evaluations = {name: e for name, e in evaluations.items() if e.num_examples}
        if not evaluations:
            return  # nobody has held-out data
        averages = round_stats.average_evaluations(evaluations)
        line = {
            "event": "evaluated",
            "round": number,
            **averages,
            "evaluations": [
                {"worker": name, "num_examples": e.num_examples, "loss": e.loss}
                | ({"metrics": dict(e.metrics)} if e.metrics else {})
                for name, e in sorted(evaluations.items())
            ],
            "evaluated_at": timestamp(),
        }
        await self._on_disk(lambda: self._store.history.append(line))
        metrics = round_stats.evaluation_metrics(averages)
        if number >= self._evaluated[0]:  # workers may evaluate an older version later
            self._evaluated = number, metrics
        await self._monitor(number, metrics)
        self._record(
            run_events.Evaluated(
                round=number,
                num_examples=averages["num_examples"],
                loss=averages["loss"],
                evaluators=tuple(averages["evaluators"]),
                metrics={name: value for name, value in metrics.items() if name != "loss"},
            )
        )

    async def _on_disk(self, write: Callable[[], object]) -> None:
        """Write in a thread, as ``when_room`` does."""
        await self.when_room(lambda: asyncio.to_thread(self._write, write))

    async def when_room(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Await ``work()``; after a ``NoRoom``, report it once and do the work again.

        Raises:
            RunError: if the run folder was removed or cannot be written.
        """
        reported = False
        while True:
            try:
                return await work()
            except NoRoom as refused:
                if not reported:
                    self._record(
                        run_events.Disk(
                            folder=str(self._store.shown),
                            reason=refused.reason,
                            pause_s=_DISK_RETRY_S,
                        )
                    )
                reported = True
                await real_sleep(_DISK_RETRY_S)

    def _write(self, write: Callable[[], _T]) -> _T:
        """Call ``write``, and turn an ``OSError`` into one of the errors of the run folder."""
        try:
            return write()
        except OSError as why:
            folder = self._store.shown
            if not self._store.folder.is_dir():
                raise RunError(
                    f"the run folder {folder} was removed during the run; restore the folder and "
                    "run the same command again (no update is lost)"
                ) from None
            reason = why.strerror or str(why)
            if why.errno in _LASTING:
                path = os.fsdecode(why.filename) if why.filename else folder
                raise RunError(
                    f"cannot write to {path} ({reason}); restore this path or its permissions, and "
                    "run the same command again (no update is lost)"
                ) from None
            raise NoRoom(folder, reason) from None
