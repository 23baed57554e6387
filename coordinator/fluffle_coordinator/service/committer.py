"""What is on disk: checkpoints and history lines, written and fsynced in the order they came.

A round is committed when its line is on disk, which is after its checkpoint. Only then does the
machine hear of it (``Committed``), send the new weights, and acknowledge the updates.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fluffle_common.clock import monotonic, timestamp
from fluffle_common.errors import RunError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.metric_names import TEST_PREFIX, add_test_prefix, avoid_fields
from fluffle_common.tensors.checkpoint import checkpoint_name
from fluffle_common.tensors.on_disk import map_to_disk
from fluffle_common.tensors.weights import Weights
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.hooks import NO_HOOKS, Commit, HookCalls, Hooks, read_only
from fluffle_coordinator.service.serial_queue import SerialQueue
from fluffle_coordinator.service.stopping import NO_STOPPING, Standing, Stopping
from fluffle_coordinator.storage.best_model import keep_best
from fluffle_coordinator.storage.history import read_history_lines
from fluffle_coordinator.storage.round_stats import Clock, Counts
from fluffle_coordinator.storage.round_stats import weighted_mean as mean
from fluffle_coordinator.storage.run_store import RunStore, new_base
from fluffle_coordinator.strategy.fedavg import FEDAVG

_DISK_RETRY_S = 5.0
# What else a round's lines in the history, and the event that tells of its evaluation, may say:
# whoever reads them puts them together. No metric is called like one of these.
_FIELDS = frozenset(
    "asked base bytes checkpoint committed_at delta ended_at epsilon evaluated_at evaluators event "
    "federation late late_updates loss metrics num_examples opened_at outcome participants reason "
    "rejected rejections round rounds run strategy tested_at time timings train_loss".split()
)


@dataclass(frozen=True)
class Average:
    """A round that is closed, and what came of it.

    Args:
        number: which round.
        weights: its average.
        asked: who was asked.
        participants: what the history tells of each update in the sum, in the order of the sum.
        clock: where its time went.
        kept: what the strategy keeps of its state.
        spent: what all rounds so far cost of privacy; empty where that is not counted.
    """

    number: int
    weights: Weights
    asked: tuple[str, ...]
    participants: list[dict[str, Any]]
    clock: Clock
    kept: Weights = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)


class Committer:
    """Writes what a run keeps.

    Args:
        store: the run's folder.
        metadata: what a checkpoint of a round says of itself.
        record: given what happened.
        post: given the events for the round machine.
        strategy: the name of the strategy.
        hooks: what is called after each commit.
        rounds: how many rounds the run is to have, for the hooks.
        stopping: when the run has done enough, and which model is its best.
    """

    def __init__(
        self,
        store: RunStore,
        *,
        metadata: Callable[[int], dict[str, str]],
        record: Callable[[run_events.RunEvent], None],
        post: Callable[[ev.Event], None],
        strategy: str = FEDAVG.name,
        hooks: Hooks = NO_HOOKS,
        rounds: int = 0,
        stopping: Stopping = NO_STOPPING,
    ) -> None:
        self.counts = Counts()
        self._store, self._metadata = store, metadata
        self._record, self._post, self._strategy = record, post, strategy
        self._hooks, self._calls, self._rounds = hooks, HookCalls(hooks, record), rounds
        # The round that was evaluated last, and its federated metrics.
        self._evaluated: tuple[int, dict[str, float]] = 0, {}
        self._stopping, self._best, self._warned = stopping, 0, False
        asked = stopping != NO_STOPPING and store.history.path.exists()
        self._standing = Standing(stopping, read_history_lines(store.folder) if asked else ())
        self._lines = SerialQueue()
        self._committed_at = monotonic()

    async def run(self) -> None:
        """Write what is asked for, for ever."""
        await self._lines.run()

    async def drained(self) -> None:
        """Return when everything that was asked for is on disk."""
        await self._lines.drained()

    async def begin_with(self, weights: Weights) -> str:
        """Save the first weights as the checkpoint of round 0; return what they are named."""
        base = new_base()
        metadata = {**self._metadata(0), "base": base}
        await self._on_disk(lambda: self._store.save_weights(0, weights, metadata))
        parameters = sum(tensor.size for tensor in weights.values())
        self._record(run_events.FirstWeights(tensors=len(weights), parameters=parameters))
        return base

    async def keep(self, place: int, held: Held, payload: Iterable[memoryview]) -> None:
        """Keep an update that was just folded, as the one of this place in the sum."""
        message, body = held.message, held.delivery.body
        assert isinstance(message, Update)
        number, worker = held.into, message.worker
        apart = None if message.transfer is None else payload
        await self._on_disk(lambda: self._store.keep_update(number, place, worker, body, apart))

    def lay_on_disk(self, delta: Weights) -> Weights:
        """Lay an update of the open round on the disk of the run; see ``tensors.on_disk``.

        Raises:
            RunError: where the disk refuses.
        """
        try:
            return map_to_disk(delta, self._store.folder)
        except OSError as why:
            raise RunError(
                f"cannot write an update of the open round to {self._store.folder} "
                f"({why.strerror}); make room there and run the same command again: no update "
                "is lost"
            ) from None

    def commit(self, average: Average) -> None:
        """Commit a round; reports ``Committed``."""
        self._lines.put(lambda: self._commit(average))

    def record_evaluation(self, number: int, evaluations: Mapping[str, rs.Evaluated]) -> None:
        """Write the federated evaluation of a round's model to the history."""
        self._lines.put(lambda: self._record_evaluation(number, evaluations))

    def record_end(self, number: int, outcome: str, reason: str) -> None:
        """Write how the run ended after a round, and what came of that round too late."""
        line = {"event": "ended", "round": number, "outcome": outcome, "reason": reason}

        async def record() -> None:
            line.update(self._not_counted(), ended_at=timestamp())
            await self._on_disk(lambda: self._store.history.append(line))

        if number:
            self._lines.put(record)

    async def _commit(self, average: Average) -> None:
        number, clock, base = average.number, average.clock, new_base()
        metadata = {**self._metadata(number), "base": base}
        line: dict[str, Any] = {
            "event": "committed",
            "run": metadata["run"],
            "round": number,
            "base": base,
            "asked": average.asked,
            "participants": average.participants,
            "opened_at": clock.opened,
            **self._not_counted(),
            "checkpoint": checkpoint_name(number),
        }
        if self._strategy != FEDAVG.name:
            line["strategy"] = self._strategy
        line |= average.spent

        def write() -> None:
            self._store.save_weights(number, average.weights, metadata, average.kept)
            line["timings"] = clock.timings(self._committed_at, monotonic())
            line["committed_at"] = timestamp()
            self._store.history.append(line)

        await self._on_disk(write)
        self._committed_at = monotonic()
        if average.spent:
            self._record(run_events.Privacy(round=number, **average.spent))
        participants: Counter[str] = Counter()  # one can be in it more than once
        for one in average.participants:
            participants[one["worker"]] += one["num_examples"]
        self._standing.took(line["timings"])
        enough = await self._call_hooks(number, average.weights, participants)
        enough = enough or self._standing.enough()
        about = base, sum(participants.values()), line["timings"], enough
        self._post(ev.Committed(monotonic(), number, *about))

    async def _call_hooks(
        self, number: int, weights: Weights, participants: Mapping[str, int]
    ) -> str:
        """Test and show a round that is on disk; return why no further round is wanted."""
        if not self._hooks:
            return ""
        weights = read_only(weights)
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
        return await self._calls.look(commit)

    async def _monitor(self, number: int, metrics: Mapping[str, float]) -> None:
        """Take note of how good a round's model is, and keep it if it is the best."""
        self._standing.note(number, metrics)
        missing = self._standing.missing(metrics)
        if missing and not self._warned:
            self._warned = True
            self._record(run_events.Note(what=missing))
        best = self._standing.best
        if self._stopping.monitor and best and best != self._best:
            await self._on_disk(lambda: keep_best(self._store.folder, best))
            self._best = best

    def _not_counted(self) -> dict[str, Any]:
        """Return what was not counted since this was last asked."""
        counts, self.counts = self.counts, Counts()
        return vars(counts)

    async def _record_evaluation(
        self, number: int, evaluations: Mapping[str, rs.Evaluated]
    ) -> None:
        evaluations = {name: one for name, one in evaluations.items() if one.num_examples}
        if not evaluations:
            return  # nobody has held-out data
        averages = federated(evaluations)
        line = {"event": "evaluated", "round": number, **averages, "evaluated_at": timestamp()}
        await self._on_disk(lambda: self._store.history.append(line))
        extra = {
            k: v for k, v in averages.items() if k not in ("num_examples", "loss", "evaluators")
        }
        self._evaluated = number, {"loss": averages["loss"], **extra}
        await self._monitor(number, self._evaluated[1])
        self._record(
            run_events.Evaluated(
                round=number,
                num_examples=averages["num_examples"],
                loss=averages["loss"],
                evaluators=tuple(averages["evaluators"]),
                metrics=extra,
            )
        )

    async def _on_disk(self, write: Callable[[], object]) -> None:
        """Write, and where the disk refuses, say so and try again until it does not."""
        reported = False
        while True:
            try:
                await asyncio.to_thread(write)
            except OSError as why:
                if not reported:
                    reason = why.strerror or str(why)
                    folder = str(self._store.folder)
                    self._record(
                        run_events.Disk(folder=folder, reason=reason, pause_s=_DISK_RETRY_S)
                    )
                reported = True
                await asyncio.sleep(_DISK_RETRY_S)
            else:
                return


def federated(evaluations: Mapping[str, rs.Evaluated]) -> dict[str, Any]:
    """Average evaluations by their number of examples; each metric over those who report it.

    Example:
        >>> a, b = rs.Evaluated(1, 1.0, {"accuracy": 0.0}), rs.Evaluated(3, 2.0, {"accuracy": 1.0})
        >>> federated({"a": a, "b": b})["loss"], federated({"a": a, "b": b})["accuracy"]
        (1.75, 0.75)
    """
    everyone = evaluations.values()
    names = sorted({name for one in everyone for name in one.metrics})
    metrics = {
        name: mean(
            [(one.num_examples, one.metrics[name]) for one in everyone if name in one.metrics]
        )
        for name in names
    }
    return {
        "num_examples": sum(one.num_examples for one in everyone),
        "loss": mean([(one.num_examples, one.loss) for one in everyone]),
        **avoid_fields(
            metrics, _FIELDS | {name for name in metrics if name.startswith(TEST_PREFIX)}
        ),
        "evaluators": sorted(evaluations),
    }
