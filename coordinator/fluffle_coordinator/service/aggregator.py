"""The aggregator: fetches and checks updates, folds them into the round's sum, and averages it.

Jobs run strictly in the order of the machine's effects, so the average contains exactly the updates
that were folded before the commit. A small job runs at once, inside the call that requests it. A
large one runs in a thread, started by the one task that serves the job queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fluffle_common.clock import monotonic
from fluffle_common.errors import LinkLost, MalformedMessage
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.messages import FirstWeights, Update
from fluffle_common.protocol.wire_format import MAX_HEADER_BYTES, header_room, read_groups
from fluffle_common.tensors.checkpoint import check_names, names_in
from fluffle_common.tensors.frozen import Frozen, frozen_of
from fluffle_common.tensors.groups import FROZEN, STATISTICS, check_statistics, untrained
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import Weights, check_finite, size_bytes
from fluffle_common.transport.fetch_parts import PartsGone
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine.effects import Fold
from fluffle_coordinator.service.committer import Average, Committer
from fluffle_coordinator.service.fetcher import Fetcher, Payload
from fluffle_coordinator.service.held_updates import Held
from fluffle_coordinator.service.serial_queue import SerialQueue
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.round_stats import Clock
from fluffle_coordinator.storage.run_store import Saved, new_base
from fluffle_coordinator.strategy.base import NO_TENSORS, Contribution, with_statistics
from fluffle_coordinator.strategy.fedavg import FEDAVG
from fluffle_coordinator.strategy.update_checks import check_metrics, decode_update
from fluffle_coordinator.user_code.calls import call_user
from fluffle_coordinator.user_code.guarded_strategy import GuardedStrategy

_T = TypeVar("_T")
_AT_ONCE_BYTES = 4 * 2**20  # about 2 ms of work


class Aggregator:
    """The weights of a run, and the running sum of its open round.

    Strategies other than FedAvg always run in a thread. ``averaged`` is called with a round and the
    name of its new weights, which are being written; not if their privacy cost is accounted for.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        saved: Saved,
        committer: Committer,
        settings: CoordinatorSettings,
        *,
        post: Callable[[ev.Event], None],
        record: Callable[[RunEvent], object] = lambda _: None,
        averaged: Callable[[int, str], object] = lambda *_: None,
    ) -> None:
        self.weights: Weights | None = saved.weights
        self.frozen = saved.frozen.tensors
        self.statistics = names_in(saved.metadata, STATISTICS)
        self.broadcast: Weights = NO_TENSORS  # the strategy's tensors that travel with the weights
        self._committer, self._post, self._record = committer, post, record
        self._strategy, self._plan = settings.strategy, settings.whole_plan
        self._keep_updates = settings.keep_updates
        # Whether an update that missed one sum may go into the next.
        self._carries = settings.schedule.max_staleness > 0
        averages = self._strategy.name == FEDAVG.name
        self._averaged, self._jobs, self._fetcher = averaged, SerialQueue(), fetcher
        self.drained = self._jobs.drained
        self._at_once_bytes = _AT_ONCE_BYTES if averages else -1
        self._state: Any = None
        if (weights := saved.weights) is not None:
            size = size_bytes(weights)
            self._jobs.put(lambda: self._off_loop(size, self._begin_sum, weights, saved))
        self._participants: list[dict[str, Any]] = []
        self._closing = False
        self._max_header: int | None = None
        self._clock = Clock()

    async def run(self) -> None:
        """Run jobs until cancelled."""
        try:
            await self._jobs.run()
        finally:
            await self._fetcher.close()

    def release(self) -> None:
        """Free the last model and its sum early: the coordinator's parts refer to each other."""
        self.weights = self._state = None

    def opened(self) -> None:
        """Start the clock of the round."""
        self._clock.open()

    def take_first(self, held: Held) -> None:
        """Check and save first weights; posts ``WeightsReady``, ``InitLost`` or ``Failed``."""
        self._jobs.put(lambda: self._take_first(held))

    def fold(self, held: Held, how: Fold, number: int) -> None:
        """Check an update and fold it into a round; posts ``Folded`` or ``FoldFailed``."""
        held.how, held.into = how, number
        if self._quick and held.message.transfer is None and not self._keep_updates:
            self._fold_at_once(held)
        else:
            self._fetcher.expect(held, self._base)
            self._jobs.put(lambda: self._fold(held))

    def drop(self, held: Held) -> None:
        """Stop fetching an acknowledged update that was postponed to the next sum."""
        if self._carries and held.into and held.message.transfer is not None:
            self._jobs.put(lambda: self._fetcher.drop(held))

    def commit(self, number: int, asked: tuple[str, ...]) -> None:
        """Average the round and commit it, without the updates whose folding has not begun."""
        self._clock.closed_at = monotonic()
        if self._quick:
            self._close(*self._finish(number, asked))
        else:
            self._closing = True
            self._jobs.put(lambda: self._average(number, asked))

    @property
    def max_header(self) -> int:
        """The longest permitted header of an update or of first weights, in bytes."""
        if self._max_header is None and self.weights is not None:  # shapes are fixed within a run
            shapes = [(name, tensor.shape) for name, tensor in self.weights.items()]
            extra = self._plan.extra or {}
            shapes += shapes if extra == "model" else [(n, tuple(s)) for n, s in extra.items()]
            self._max_header = header_room(shapes)
        return MAX_HEADER_BYTES if self._max_header is None else self._max_header

    @property
    def _quick(self) -> bool:
        """Whether a job may run at once: the model is small and no earlier job waits."""
        return self._jobs.idle and size_bytes(self._base) <= self._at_once_bytes

    @property
    def _base(self) -> Weights:
        """The weights that updates are added to."""
        assert self.weights is not None
        return self.weights

    def _in_round(self, number: int) -> GuardedStrategy:
        return GuardedStrategy(self._strategy, number)

    def _begin_sum(self, weights: Weights, saved: Saved | None = None) -> None:
        """Begin the first sum, from what the strategy saved if the run has committed rounds."""
        committed = saved.committed if saved else 0
        names = frozenset(self.statistics)
        strategy = with_statistics(self._in_round(committed + 1), names)
        self._strategy = strategy.named
        if saved and committed:
            self._state = strategy.load(saved.kept, weights)
        else:
            self._state = strategy.init(weights)
        self.broadcast = strategy.broadcast(self._state)

    async def _take_first(self, held: Held) -> None:
        message = held.message
        assert isinstance(message, FirstWeights)
        if self.weights is None:
            try:
                payload = await self._fetcher.payload(held, self.weights)
                assert isinstance(payload, memoryview)
                groups = read_groups(message.tensors, payload)
                weights = groups[MODEL]
                if not weights:
                    raise ValueError("the message contains no tensor")
                check_names(weights)
                check_statistics(message.statistics, weights)
                frozen = await asyncio.to_thread(_checked, weights, groups.get(FROZEN, NO_TENSORS))
            except LinkLost:
                held.free()
                return  # the broker delivers them again
            except PartsGone:
                self._post(ev.InitLost(monotonic(), message.worker))
            except (MalformedMessage, ValueError) as wrong:
                self._post(ev.Failed(monotonic(), message.worker, message.run, 0, str(wrong)))
            else:
                self.statistics = message.statistics
                base, self.frozen = await self._committer.begin_with(weights, frozen)
                self.weights = weights
                await self._off_loop(size_bytes(weights), self._begin_sum, weights)
                self._post(ev.WeightsReady(monotonic(), base, frozen.digest))
        held.delivery.ack()
        held.free()

    async def _fold(self, held: Held) -> None:
        if self._closing:
            if self._carries:
                self._fetcher.postpone(held)
            else:
                await self._fetcher.drop(held)
            return
        update = held.how.update
        try:
            payload = await self._fetcher.payload(held, self.weights)
            # Folding touches the whole model, however small the encoded update is.
            nbytes = max(update.size_bytes, size_bytes(self._base))
            fold = partial(self._off_loop, nbytes, self._check_and_fold, held, payload)
            # A user's strategy may have changed its state before the disk refused the update.
            norm = await (self._committer.when_room(fold) if self._strategy.ours else fold())
        except (LinkLost, PartsGone, OSError) as gone:
            self._post(ev.FoldFailed(monotonic(), update.ticket, str(gone), again=True))
        except MalformedMessage as wrong:
            self._post(ev.FoldFailed(monotonic(), update.ticket, str(wrong), wrong.cause))
        else:
            if self._keep_updates:
                pieces = [payload] if isinstance(payload, memoryview) else payload.pieces
                await self._committer.keep(len(self._participants) + 1, held, pieces)
            self._folded(held, norm)

    def _fold_at_once(self, held: Held) -> None:
        try:
            norm = self._check_and_fold(held, held.payload)
        except MalformedMessage as wrong:
            ticket = held.how.update.ticket
            self._post(ev.FoldFailed(monotonic(), ticket, str(wrong), wrong.cause))
        else:
            self._folded(held, norm)

    def _check_and_fold(self, held: Held, payload: Payload) -> float:
        """Fold an update into the sum; return the norm of its delta."""
        message, how = held.message, held.how
        assert isinstance(message, Update)
        began = monotonic()
        check_metrics(message, self._strategy.strategy.needs)
        if isinstance(payload, memoryview):
            payload = payload.toreadonly()  # --keep-updates and rejection need the original bytes
        delta, norm, extra = decode_update(message, payload, self._base, self._plan)
        if norm > how.max_norm:
            raise MalformedMessage(
                f"the norm of the update is too large: {norm:.3g}, but the limit is "
                f"{how.max_norm:.3g} (--max-norm-ratio)",
                "norm",
            )
        contribution = Contribution(
            worker=message.worker,
            num_examples=how.update.num_examples,
            delta=delta,
            staleness=how.staleness,
            discount=how.discount,
            extra=extra,
            metrics=message.metrics,
            lay_on_disk=self._committer.lay_on_disk,
        )
        self._state = self._in_round(held.into).fold(self._state, contribution)
        self._clock.fold_s += monotonic() - began
        return norm

    def _folded(self, held: Held, norm: float) -> None:
        message, how, now = held.message, held.how, monotonic()
        assert isinstance(message, Update)
        update, metrics = how.update, dict(message.metrics)
        participant: dict[str, Any] = {
            "worker": message.worker,
            "sequence": update.ticket.sequence,
            "num_examples": update.num_examples,
            "train_loss": metrics.pop("loss", None),
            "seconds": update.train_s,
            "counted_s": round(now - self._clock.opened_at, 6),
            "bytes": update.size_bytes,
            "norm": norm,
        }
        if how.staleness:
            weight = update.num_examples * how.discount
            participant |= {"staleness": how.staleness, "discount": how.discount, "weight": weight}
        if metrics:
            participant["metrics"] = metrics
        self._participants.append(participant)
        held.forget()  # not earlier: a rejected update keeps its original bytes
        self._post(ev.Folded(now, update.ticket, norm))

    async def _average(self, number: int, asked: tuple[str, ...]) -> None:
        self._close(*await self._off_loop(size_bytes(self._base), self._finish, number, asked))

    def _finish(self, number: int, asked: tuple[str, ...]) -> tuple[Average, Any, Weights]:
        """Return the average, and the strategy's next state with the tensors that it broadcasts."""
        strategy = self._in_round(number)
        weights, state = strategy.finish(self._state, self._base)
        for name, tensor in untrained(self._base, self._plan.train).items():
            weights[name][...] = tensor
        average = Average(
            number,
            weights,
            new_base(),
            asked,
            self._participants,
            self._clock,
            strategy.dump(state),
            strategy.spent(number),
        )
        return average, state, strategy.broadcast(state)

    def _close(self, average: Average, state: Any, broadcast: Weights) -> None:
        """Commit the average and begin the next sum."""
        self._clock.averaged_at = monotonic()
        self._committer.commit(average)
        self.weights, self._state, self.broadcast = average.weights, state, broadcast
        self._clock = Clock()
        self._participants, self._closing = [], False
        # A private model leaves only after its privacy cost is on disk: after a crash, the round
        # would be averaged again with other noise, and two models would leave for the cost of one.
        if not average.spent:
            self._averaged(average.number, average.base)

    async def _off_loop(self, nbytes: int, work: Callable[..., _T], *on: Any) -> _T:
        """Call ``work``, whose time grows with ``nbytes``: in a thread, unless that is small."""
        if nbytes <= self._at_once_bytes:
            return work(*on)  # the trip to a thread and back would take longer
        what = f"the strategy {self._strategy.name}"
        return await call_user(what, partial(work, *on), self._record)


def _checked(weights: Weights, frozen: Weights) -> Frozen:
    check_finite(weights)
    check_finite(frozen)
    return frozen_of(frozen)
