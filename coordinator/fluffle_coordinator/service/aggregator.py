"""From deliveries to committed rounds: checks, the running sum, checkpoint and history line.

What goes into the sum and out of it happens in the order it was asked for: at once where that takes
no time, else in one task and off the event loop. So what is in the sum when a round is averaged is
exactly what was folded before. What is averaged is written by another task, in order too: the disk
may take its time while the next round has begun.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fluffle_common.clock import timestamp
from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.protocol.codec import MAX_HEADER_BYTES, header_room, read_tensors
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.metric_names import beside
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.checkpoint import checkpoint_name
from fluffle_common.tensors.weights import Weights, check_finite, size_bytes
from fluffle_common.transport.base import Link
from fluffle_common.transport.messaging import PartsGone, fetch
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.serial_queue import SerialQueue
from fluffle_coordinator.storage.round_stats import Clock, Counts
from fluffle_coordinator.storage.round_stats import weighted_mean as mean
from fluffle_coordinator.storage.run_store import RunStore, new_base
from fluffle_coordinator.strategy.contribution import check_announced, decode_contribution
from fluffle_coordinator.strategy.fedavg import Strategy, Sum, fedavg

Tell = Callable[[str, dict[str, Any]], None]
_T = TypeVar("_T")
_DISK_RETRY_S = 5.0
_AT_ONCE_BYTES = 4 * 2**20  # two milliseconds of work
# What else a round's lines in the history, and the event that tells of its evaluation, may say:
# whoever reads them puts them together. No metric is called like one of these.
_FIELDS = frozenset(
    "asked base bytes checkpoint committed_at evaluated_at evaluators event federation late "
    "late_updates loss metrics num_examples opened_at participants rejected rejections round "
    "rounds run time timings train_loss".split()
)


class Aggregator:
    """The weights of a run, the running sum of its open round, and its store.

    Args:
        store: where the run is kept.
        topology: where the parts of large updates lie.
        weights: the last committed weights; None where the first are yet to come.
        max_model_bytes: the most that a model or an update may have.
        link: the link of the moment, None where there is none.
        metadata: what a checkpoint of a round says of itself.
        tell: told what happens.
        post: given the events for the round machine.
        strategy: how a round is averaged.
        keep_updates: whether the store keeps what is folded.
        verify_users: whether the parts of an update have to come from its worker's own user.
        averaged: given new weights, which will be sent once they are on disk.
    """

    def __init__(
        self,
        store: RunStore,
        topology: Topology,
        weights: Weights | None,
        *,
        max_model_bytes: int,
        link: Callable[[], Link | None],
        metadata: Callable[[int], dict[str, str]],
        tell: Tell,
        post: Callable[[ev.Event], None],
        strategy: Strategy = fedavg,
        keep_updates: bool = False,
        verify_users: bool = False,
        averaged: Callable[[Weights], object] = lambda _: None,
    ) -> None:
        self.weights = weights
        self.counts = Counts()
        self.asked: set[str] = set()  # whom the work of the open round was sent to
        self._store, self._topology, self._max_bytes = store, topology, max_model_bytes
        self._link, self._metadata, self._tell, self._post = link, metadata, tell, post
        self._strategy, self._keep_updates = strategy, keep_updates
        self._verify_users, self._averaged = verify_users, averaged
        self._jobs, self._lines = SerialQueue(), SerialQueue()
        self._sum = strategy.init(weights) if weights is not None else None
        self._participants: dict[str, dict[str, Any]] = {}
        self._in_parts = False  # whether an update in the sum came in parts
        self._closing = False
        self._max_header: int | None = None
        self._clock, self._opened_at = Clock(), timestamp()
        self._committed_at = time.monotonic()  # the last round that is on disk

    async def run(self) -> None:
        """Do what is asked for, for ever."""
        await run_all(self._jobs.run(), self._lines.run())

    async def drained(self) -> None:
        """Return when everything that was asked for is done."""
        await self._jobs.drained()
        await self._lines.drained()

    def opened(self) -> None:
        """Note that the round is open."""
        self._clock.opened_at, self._opened_at = time.monotonic(), timestamp()

    def take_first(self, held: Held) -> None:
        """Check, save and use the first weights that a worker sent; reports ``WeightsReady``."""
        self._jobs.put(lambda: self._take_first(held))

    def fold(self, held: Held, worker: str, num_examples: int, max_norm: float = math.inf) -> None:
        """Check an update and fold it, with this weight; reports ``Folded`` or ``FoldFailed``."""
        held.num_examples, held.max_norm = num_examples, max_norm
        if self._quick and held.message.transfer is None and not self._keep_updates:
            self._fold_at_once(held, worker)
        else:
            self._jobs.put(lambda: self._fold(held, worker))

    def commit(self, number: int) -> None:
        """Commit the round; reports ``Averaged``, where it may, and ``Committed``.

        What is not being folded yet stays out.
        """
        if self._quick:
            self._clock.closed_at = time.monotonic()
            self._commit(number, *self._strategy.finish(*self._so_far))
        else:
            self._closing = True
            self._jobs.put(lambda: self._average_and_commit(number))

    @property
    def max_header(self) -> int:
        """How long the header of an update may be, or of the first weights."""
        if self._max_header is None and self.weights is not None:  # it stays as it is, in a run
            shapes = [(name, tensor.shape) for name, tensor in self.weights.items()]
            self._max_header = header_room(shapes)
        return MAX_HEADER_BYTES if self._max_header is None else self._max_header

    @property
    def _quick(self) -> bool:
        """Whether what is over at once may be done at once: nothing that was asked for waits."""
        return self._jobs.idle and size_bytes(self._so_far[1]) <= _AT_ONCE_BYTES

    @property
    def _so_far(self) -> tuple[Sum, Weights]:
        """The running sum, and the weights that it is of."""
        assert self._sum is not None
        assert self.weights is not None
        return self._sum, self.weights

    def record_evaluation(self, number: int, evaluations: Mapping[str, rs.Evaluated]) -> None:
        """Write the federated evaluation of a round's model to the history."""
        self._lines.put(lambda: self._record_evaluation(number, evaluations))

    async def _take_first(self, held: Held) -> None:
        message = held.message
        if self.weights is None:
            try:
                payload = await self._payload(held)
                weights = read_tensors(message.tensors, payload)
                if not weights:
                    raise ValueError("there is no tensor")
                check_finite(weights)
            except LinkLost:
                held.free()
                return  # they come again
            except PartsGone:
                self._post(ev.InitLost(time.monotonic(), message.worker))
            except (MalformedMessage, ValueError) as wrong:
                self._post(ev.Failed(time.monotonic(), message.worker, message.run, 0, str(wrong)))
            else:
                await self.begin_with(weights)
        held.delivery.ack()
        held.free()

    async def begin_with(self, weights: Weights) -> None:
        """Save the first weights as the checkpoint of round 0, and use them."""
        base = new_base()
        metadata = {**self._metadata(0), "base": base}
        await self._on_disk(lambda: self._store.save_weights(0, weights, metadata))
        self.weights, self._sum = weights, self._strategy.init(weights)
        self._tell(
            "first_weights",
            {"tensors": len(weights), "parameters": sum(t.size for t in weights.values())},
        )
        self._post(ev.WeightsReady(time.monotonic(), base))

    async def _fold(self, held: Held, worker: str) -> None:
        if self._closing:
            return
        try:
            payload = await self._payload(held)
            # However few bytes came, they are folded into all of the model.
            nbytes = max(len(payload), size_bytes(self._so_far[1]))
            norm = await _off_loop(nbytes, self._check_and_fold, held, payload)
        except (LinkLost, PartsGone) as gone:
            self._post(ev.FoldFailed(time.monotonic(), worker, str(gone), again=True))
        except MalformedMessage as wrong:
            self._post(ev.FoldFailed(time.monotonic(), worker, str(wrong), wrong.cause))
        else:
            if self._keep_updates:
                await self._keep(held, payload, worker)
            self._folded(held, worker, len(payload), norm)

    def _fold_at_once(self, held: Held, worker: str) -> None:
        try:
            norm = self._check_and_fold(held, held.payload)
        except MalformedMessage as wrong:
            self._post(ev.FoldFailed(time.monotonic(), worker, str(wrong), wrong.cause))
        else:
            self._folded(held, worker, len(held.payload), norm)

    def _check_and_fold(self, held: Held, payload: memoryview) -> float:
        """Take an update into the sum; return the norm of its delta."""
        message = held.message
        assert isinstance(message, Update)
        began = time.monotonic()
        so_far, weights = self._so_far
        delta, norm = decode_contribution(message, payload, weights)
        if norm > held.max_norm:
            raise MalformedMessage(
                f"the norm of the update is {norm:.3g}, at most {held.max_norm:.3g} is taken "
                "(--max-norm-ratio)",
                "norm",
            )
        self._sum = self._strategy.fold(so_far, delta, held.num_examples)
        self._clock.fold_s += time.monotonic() - began
        return norm

    def _folded(self, held: Held, worker: str, nbytes: int, norm: float) -> None:
        message, now = held.message, time.monotonic()
        assert isinstance(message, Update)
        self._in_parts |= message.transfer is not None
        participant: dict[str, Any] = {
            "worker": worker,
            "num_examples": held.num_examples,
            "train_loss": message.metrics.get("loss"),
            "seconds": message.seconds,
            "counted_s": round(now - self._clock.opened_at, 6),
            "bytes": nbytes,
            "norm": norm,
        }
        metrics = {name: value for name, value in message.metrics.items() if name != "loss"}
        if metrics:
            participant["metrics"] = metrics
        self._participants[worker] = participant
        held.forget()  # only now: what is rejected is kept as it came
        self._post(ev.Folded(now, worker, message.seconds, nbytes, norm))

    async def _keep(self, held: Held, payload: memoryview, worker: str) -> None:
        """Keep an update that was just folded, as it came."""
        message, body, place = held.message, held.delivery.body, len(self._participants) + 1
        assert isinstance(message, Update)
        apart = None if message.transfer is None else payload
        await self._on_disk(
            lambda: self._store.keep_update(message.round, place, worker, body, apart)
        )

    async def _payload(self, held: Held) -> memoryview:
        transfer = held.message.transfer
        if transfer is None:
            return held.payload
        check_announced(held.message, self.weights)
        link = self._link()
        if link is None:
            raise LinkLost("the link was lost")
        worker = held.message.worker
        return await fetch(
            link,
            self._topology.outbox(worker),
            transfer,
            self._max_bytes,
            self._topology.rejected,
            user=worker if self._verify_users else None,
        )

    async def _average_and_commit(self, number: int) -> None:
        self._clock.closed_at = time.monotonic()
        so_far, weights = self._so_far
        found = await _off_loop(size_bytes(weights), self._strategy.finish, so_far, weights)
        self._commit(number, *found)

    def _commit(self, number: int, weights: Weights, emptied: Sum) -> None:
        clock = self._clock
        clock.averaged_at = time.monotonic()
        base = new_base()
        metadata = {**self._metadata(number), "base": base}
        counts, self.counts = self.counts, Counts()  # from here on, of the next round
        line: dict[str, Any] = {
            "event": "committed",
            "run": metadata["run"],
            "round": number,
            "base": base,
            "asked": sorted(self.asked | self._participants.keys()),
            "participants": list(self._participants.values()),  # in the order of the sum
            "opened_at": self._opened_at,
            "late": counts.late,
            "rejected": counts.rejected,
            "late_updates": counts.late_updates,
            "rejections": counts.rejections,
            "checkpoint": checkpoint_name(number),
        }

        done = number, frozenset(self._participants), base
        num_examples = sum(one["num_examples"] for one in self._participants.values())

        def write() -> None:
            self._store.save_weights(number, weights, metadata)
            line["timings"] = clock.timings(self._committed_at, time.monotonic())
            line["committed_at"] = timestamp()
            self._store.append(line)

        async def save() -> None:
            await asyncio.sleep(0)  # first, what follows from the average is sent
            await self._on_disk(write)
            self._committed_at = time.monotonic()
            about = {"num_examples": num_examples, "timings": line["timings"]}
            self._post(ev.Committed(self._committed_at, *done, about))

        self._averaged(weights)
        self._lines.put(save)
        in_parts = self._in_parts
        # From here on, of the next round.
        self.weights, self._sum, self._clock = weights, emptied, Clock()
        self._participants, self._in_parts, self.asked, self._closing = {}, False, set(), False
        if not in_parts:
            self._post(ev.Averaged(time.monotonic(), *done))

    async def _record_evaluation(
        self, number: int, evaluations: Mapping[str, rs.Evaluated]
    ) -> None:
        evaluations = {name: one for name, one in evaluations.items() if one.num_examples}
        if not evaluations:
            return  # nobody has held-out data
        told = federated(evaluations)
        line = {"event": "evaluated", "round": number, **told, "evaluated_at": timestamp()}
        await self._on_disk(lambda: self._store.append(line))
        extra = {k: v for k, v in told.items() if k not in ("num_examples", "loss", "evaluators")}
        self._tell("evaluated", {"round": number, **told, "metrics": extra})

    async def _on_disk(self, write: Callable[[], object]) -> None:
        """Write, and where the disk refuses, say so and try again until it does not."""
        told = False
        while True:
            try:
                await asyncio.to_thread(write)
            except OSError as why:
                if not told:
                    reason = why.strerror or str(why)
                    self._tell(
                        "disk",
                        {
                            "folder": str(self._store.folder),
                            "reason": reason,
                            "pause_s": _DISK_RETRY_S,
                        },
                    )
                told = True
                await asyncio.sleep(_DISK_RETRY_S)
            else:
                return


async def _off_loop(nbytes: int, work: Callable[..., _T], *on: Any) -> _T:
    """Do what takes time in proportion to ``nbytes``: in a thread, unless it is over at once."""
    if nbytes <= _AT_ONCE_BYTES:
        return work(*on)  # handing it to a thread and back would take longer
    return await asyncio.to_thread(work, *on)


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
        **beside(metrics, _FIELDS),
        "evaluators": sorted(evaluations),
    }
