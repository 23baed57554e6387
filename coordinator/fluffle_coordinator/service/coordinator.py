"""The coordinator: the asyncio shell around the pure round machine.

Data flows in one direction::

    link ──> intake ──> events ──> advance() ──> effects ─┬─> outbox     (publishes, in order)
                          ^                               └─> aggregator (the sum, in order)
                          └────────────────────────────────── committer  (the disk, in order)

Only ``_post`` changes the state, one event at a time. The outbox, the aggregator and the committer
each have a job queue and a task of their own, so neither a slow broker nor a slow disk delays the
reading of heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from fluffle_common.clock import monotonic
from fluffle_common.concurrency import run_all
from fluffle_common.debug_loggers import log_step, logger
from fluffle_common.errors import LinkLost, TaskError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.exchanges import Handlers, Sent
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.frozen import IN_METADATA
from fluffle_common.tensors.groups import STATISTICS
from fluffle_common.transport.base import (
    Link,
    QueueInUse,
    Transport,
    UnknownQueueType,
    report_blocking,
)
from fluffle_common.transport.reconnect import reconnecting
from fluffle_coordinator.machine import effects as fx
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import machine
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.observe.waiting import WaitingReport
from fluffle_coordinator.observe.watchers import Watcher
from fluffle_coordinator.service.aggregator import Aggregator
from fluffle_coordinator.service.committer import Committer
from fluffle_coordinator.service.fetcher import Fetcher
from fluffle_coordinator.service.intake import Intake
from fluffle_coordinator.service.outbox import Outbox
from fluffle_coordinator.service.run_opening import first_state
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.service.standby import Standby
from fluffle_coordinator.service.topology_watch import keep_bound
from fluffle_coordinator.storage.run_store import RunStore, Saved

_LOG = logger("coordinator.machine")
_JOURNAL_DRAIN_S = 2.0  # how long the end of a run waits for the broker to take the journal
# Malformed ones stay unacknowledged while their rejection waits behind a model that is being sent.
_PREFETCH = 1000
_TICK_EVERY_S = 0.1  # minimum interval between timer checks under load


class Coordinator:
    """One run of a federation, in a locked run folder.

    ``watcher`` receives every run event; ``journal`` is the one that publishes the events once a
    link is there, and None publishes none. ``exchanges`` handle multi-phase protocols.
    """

    _ended: asyncio.Future[None]
    _next_tick: asyncio.TimerHandle

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        transport: Transport,
        topology: Topology,
        store: RunStore,
        saved: Saved,
        watcher: Watcher,
        journal: Journal | None = None,
        exchanges: Handlers | None = None,
    ) -> None:
        self._settings, self._transport, self._topology = settings, transport, topology
        self._watcher, self._journal, self._folder = watcher, journal, store.shown
        self._events, self._advancing = deque[ev.Event](), False
        self._link: Link | None = None
        self._linked = asyncio.Event()
        self._next_tick_at: float | None = 0.0  # None: the timer has just expired
        self._standby = Standby(f"federation {settings.federation} on this broker", watcher)
        self._waiting = WaitingReport(settings.waiting_every_s, monotonic())
        self._outbox = Outbox(
            topology,
            saved.run,
            settings,
            link=lambda: self._link,
            a_link=self._a_link,
            record=self._record,
        )
        self._committer = Committer(
            store,
            settings,
            metadata=self._metadata,
            record=self._record,
            post=self._post,
            lines=saved.lines,
        )
        self._aggregator = Aggregator(
            Fetcher(topology, settings, link=lambda: self._link, folder=store.folder),
            saved,
            self._committer,
            settings,
            post=self._post,
            record=self._record,
            averaged=self._send_ahead,
        )
        self._intake = Intake(
            settings,
            topology,
            task=saved.metadata.get("task", ""),
            exchanges=exchanges or {},
            aggregator=self._aggregator,
            outbox=self._outbox,
            state=lambda: self.state,
            post=self._post,
            record=self._record,
        )
        self.enough = self._committer.enough
        self.state = first_state(settings, saved, store.folder, self.enough())

    async def run(self) -> rs.State:
        """Run to the end and return the final state; cancelling loses nothing a restart needs.

        Raises:
            TaskError: if the user's strategy, schedule or selection fails.
        """
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._next_tick = loop.call_later(0.0, self._tick)
        _, *others = tasks = [
            asyncio.create_task(work(), name=work.__name__)
            for work in (
                self._links,
                self._end,
                self._aggregator.run,
                self._committer.run,
                self._outbox.run,
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # only _end returns; any other task that is done has failed
        except asyncio.CancelledError:
            if self.state.outcome is None:
                self._record(run_events.Interrupted(folder=str(self._folder)))
            raise
        except TaskError as wrong:
            self._record(run_events.Note(what=str(wrong)))  # so that the journal shows it too
            raise
        finally:
            # For good: nothing is done or reported while the journal is published.
            self._advancing, self._watcher = True, Watcher()
            for task in others:
                task.cancel()
            try:
                if self._journal is not None:
                    await self._journal.drained(_JOURNAL_DRAIN_S)
            finally:  # also if it is cancelled meanwhile
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._next_tick.cancel()  # last, because the end of the link is an event, too
                self._aggregator.release()
        return self.state

    async def _end(self) -> None:
        """Wait until the machine has ended and every job queue is empty."""
        await self._ended
        await self._aggregator.drained()
        await self._committer.drained()
        await self._outbox.drained()
        kind = run_events.Finished if self.state.outcome == "finished" else run_events.Stopped
        self._record(kind(reason=self.state.reason))

    def exchange(self, sent: Sent) -> None:
        """Send a message of a multi-phase protocol; it is dropped if the link is lost meanwhile.

        Raises:
            ValueError: if its tensors cannot travel, or are too large for one message.
        """
        self._outbox.exchange(sent, sent.body())

    def _post(self, event: ev.Event) -> None:
        """Advance the machine and perform the effects.

        An effect may post events itself: the call that is already in progress handles them next.
        """
        self._events.append(event)
        if self._advancing:
            return
        self._advancing, had_effects = True, False
        try:
            while self._events:
                event = self._events.popleft()
                self.state, effects = machine.advance(self.state, event)
                if effects or not isinstance(event, ev.Tick | ev.Echoed):
                    log_step(_LOG, event, effects)
                for effect in effects:
                    self._perform(effect)
                had_effects |= bool(effects)
            self._after_events(event.now, had_effects=had_effects)
        except Exception as wrong:  # the poster cannot handle it, so it ends the run
            if not self._ended.done():
                self._ended.set_exception(wrong)
            return  # for good: the state may lack what an effect has done
        self._advancing = False

    def _after_events(self, now: float, *, had_effects: bool) -> None:
        """Show the new state, notice the end, and keep the next tick near."""
        self._watcher.show(self.state, now)
        waiting = self._waiting.due(self.state, now, had_effects=had_effects)
        if waiting is not None:
            self._record(waiting)
        if self.state.phase is rs.Phase.ENDED and not self._ended.done():
            self._ended.set_result(None)
        if self._next_tick_at is None:
            left_s = min(self._waiting.due_at, machine.wakeup(self.state)) - monotonic()
            self._tick_in(left_s if left_s > 0 else _TICK_EVERY_S)
        elif self._next_tick_at > now + _TICK_EVERY_S:
            self._tick_in(_TICK_EVERY_S)

    def _tick(self) -> None:
        """Let the machine look at the clock, then sleep until its next deadline.

        Ticks come from this timer only, because checking deadlines after every event would be
        expensive when many arrive.
        """
        self._next_tick_at = None
        self._post(ev.Tick(monotonic()))

    def _tick_in(self, seconds: float) -> None:
        self._next_tick.cancel()
        self._next_tick_at = monotonic() + seconds
        self._next_tick = asyncio.get_running_loop().call_later(seconds, self._tick)

    def _perform(self, effect: fx.Effect | run_events.RunEvent) -> None:
        match effect:  # the most frequent effects come first
            case run_events.RunEvent():
                match effect:
                    case run_events.Opened():
                        self._aggregator.opened()
                    case run_events.Reopened(asked=names):
                        self._bind_again(names or ())
                    case run_events.Resend(worker=str(name)) | run_events.Init(worker=str(name)):
                        self._bind_again((name,))  # else its parts may be lost again
                self._record(effect)
            case fx.Fold(update):
                self._aggregator.fold(self._intake.held(update.handle), effect, self.state.round)
            case fx.Ack(handle):
                self._intake.ack(handle)
            case fx.Forget(handle):
                self._intake.held(handle).forget()
            case fx.Reject(handle, reason, cause):
                self._intake.reject(handle, reason, cause)
            case fx.Commit(number, asked):
                self._aggregator.commit(number, asked)
            case fx.RecordEvaluation(number, evaluations):
                self._committer.record_evaluation(number, evaluations)
            case fx.End(outcome, reason):
                self._committer.record_end(self.state.committed, outcome, reason)
                self._outbox.perform(effect, self.state, None)
            case _:
                last = self._aggregator  # which has the last model
                self._outbox.perform(effect, self.state, last.weights, last.broadcast, last.frozen)

    def _bind_again(self, names: Iterable[str]) -> None:
        """Bind the queues of workers that do not answer: somebody may have deleted a binding."""
        for name in names:
            if (worker := self.state.workers.get(name)) is not None:
                self._outbox.bind(name, worker.session, again=True)

    def _send_ahead(self, number: int, base: str) -> None:
        """Begin to send the work of the next round while its weights are being written to disk.

        The machine is pure, so it can tell what it will ask for once they are. If it then asks for
        something else, because a worker has joined or left, that is sent in full.
        """
        weights, broadcast = self._aggregator.weights, self._aggregator.broadcast
        assert weights is not None
        if self._outbox.prepare(weights, broadcast) is None or self.state.schedule.continuous:
            return
        state, effects = machine.advance(self.state, ev.Committed(monotonic(), number, base))
        for effect in effects:
            if isinstance(effect, fx.SendFit):
                self._outbox.begin(effect, state, weights, broadcast)

    def _record(self, event: run_events.RunEvent) -> None:
        self._committer.counts.note(event)
        if isinstance(event, run_events.BrokerEvent):
            event = replace(event, address=self._transport.address)
        self._watcher.record(event)

    def _metadata(self, number: int) -> dict[str, str]:
        return {
            "federation": self._settings.federation,
            "run": self.state.run,
            "round": str(number),
            "task": self._intake.task,
            "classes": json.dumps(list(self.state.classes or ())),
            STATISTICS: json.dumps(self._aggregator.statistics),
            **({IN_METADATA: self.state.frozen} if self.state.frozen else {}),
        }

    async def _links(self) -> None:
        def no_broker(reason: str) -> None:
            self._record(run_events.NoBroker(reason=reason))

        await self._aggregator.drained()  # the strategy has loaded its state
        opened = reconnecting(self._transport, self._settings.backoff, no_broker)
        number = 0
        async with contextlib.aclosing(opened):
            async for link in opened:
                number += 1
                try:
                    await self._serve(link, number)
                except QueueInUse:
                    self._standby.waits()
                except LinkLost as gone:
                    self._record(run_events.Disconnected(reason=str(gone)))
                finally:
                    self._link = None
                    self._linked.clear()
                    self._intake.link_lost()
                    self._post(ev.Disconnected(monotonic()))

    async def _serve(self, link: Link, number: int) -> None:
        await link.declare(self._topology.required())
        await self._declare_journal(link)
        # Exclusive: the consumer of this queue is the federation's only active coordinator.
        presence = await link.consume(self._topology.presence, prefetch=_PREFETCH, exclusive=True)
        self._standby.takes_over()
        self._link = link
        self._linked.set()
        for worker in self.state.workers.values():  # before the machine sends them anything
            self._outbox.bind(worker.name, worker.session, again=False)
        self._post(ev.Connected(monotonic(), number))
        tasks = [
            self._intake.read_presence(presence),
            self._intake.send_echoes(link, number),
            self._intake.consume_updates(link, number),
            report_blocking(link, self._record),
            keep_bound(link, self._topology, journaled=self._journal is not None),
        ]
        await run_all(*tasks, *([self._journal.publish(link)] if self._journal else []))

    async def _declare_journal(self, link: Link) -> None:
        """Declare the journal's queue; run without a journal if the broker cannot hold one."""
        if self._journal is not None:
            try:
                await link.declare([self._topology.journal_stream()])
            except UnknownQueueType:
                self._journal = None
                self._record(run_events.NoJournal())

    async def _a_link(self) -> Link:
        while self._link is None:
            await self._linked.wait()
        return self._link
