"""The receiving half of the played coordinator: collects, checks and awaits a worker's messages."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost, MalformedMessage, UsageError
from fluffle_common.protocol.messages import (
    Evaluation,
    Failure,
    FirstWeights,
    Fit,
    FromWorker,
    Heartbeat,
    Hello,
    Update,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.base import Delivery, Link
from fluffle_coordinator.conformance.received import (
    Received,
    ReceivedUpdate,
    Unmet,
    at_work_on,
    envelope_faults,
    signs_of_life,
)

_T = TypeVar("_T")
_PREFETCH = 100
_POLL_S = 2.0
RUNS = "conformance-"
"""Prefix of the ids of the runs played here."""


@dataclass(frozen=True)
class ExamOptions:
    """The options of an examination."""

    worker: str | None = None  # the ID of the worker to check; None takes the first that connects
    large: bool = False  # add a tensor to the model, so that it travels in parts
    twice: bool = False  # wait for a second start of the worker, and refuse it
    wait_s: float = 600.0  # for the worker
    patience_s: float = 60.0  # for an answer
    tell: Callable[[str], object] = lambda _: None  # called with progress messages for people


class SentFit(NamedTuple):
    """A ``fit`` that was sent, and the number of messages that had arrived before it."""

    fit: Fit
    since: int


class Listener(ABC):
    """Keeps the messages of the examined worker, from its first sign of life on."""

    def __init__(self, link: Link, topology: Topology, options: ExamOptions) -> None:
        self.link, self.topology, self.options = link, topology, options
        self.worker = options.worker
        self.messages: list[Received] = []
        self.faults: list[str] = []  # of any message; the scenario "well formed" reports them
        self.without_user_id = 0  # messages
        self._reading: asyncio.Future[None]
        self._news = asyncio.Event()
        self._now = asyncio.get_running_loop().time

    @abstractmethod
    async def greet(self) -> None:
        """Answer a hello of the worker, or its first heartbeat if that comes first."""

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Read what workers send while the body runs; ``until`` raises what prevents it."""
        self._reading = asyncio.ensure_future(self._read())
        self._reading.add_done_callback(lambda _: self._news.set())
        try:
            yield
        finally:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        names = self.topology
        presence = await self.link.consume(names.presence, prefetch=_PREFETCH, exclusive=True)
        updates = await self.link.consume(names.updates, prefetch=_PREFETCH)

        async def take_all(deliveries: AsyncIterator[Delivery]) -> None:
            async for delivery in deliveries:
                await self._take(delivery)

        await run_all(take_all(presence), take_all(updates))
        raise LinkLost("the connection was closed")

    async def _take(self, delivery: Delivery) -> None:
        try:
            message, payload = decode(delivery.body, self.topology.federation)
        except MalformedMessage as why:
            self.faults.append(f"a message in {delivery.queue} is malformed ({why})")
            delivery.ack()
            self._news.set()
            return
        if isinstance(message, Update | Evaluation | FirstWeights):
            if not message.run.startswith(RUNS):  # of a real run, which has to stay in the queue
                raise UsageError(
                    f"federation {self.topology.federation} has messages of run {message.run}; "
                    "set --federation to a name that nothing else uses"
                )
        delivery.ack()
        if not isinstance(message, FromWorker):
            return  # the echo of an earlier coordinator
        present = isinstance(message, Hello | Heartbeat) and self.worker in (None, message.worker)
        if present and (isinstance(message, Hello) or not self.messages):
            self.worker = message.worker
            await self.greet()
        if message.worker == self.worker and (present or self.messages):
            self.faults += envelope_faults(message, delivery)
            self.without_user_id += delivery.properties.user is None
            self.messages.append(Received(self._now(), message, payload))
            self._news.set()

    # --- waiting -------------------------------------------------------------------------------

    async def until(
        self, find: Callable[[], _T | None], what: str, *, within_s: float | None = None
    ) -> _T:
        """Wait until ``find`` returns something other than None, and return that.

        Without ``within_s``, wait as long as the options say and someone consumes from the inbox.

        Raises:
            Unmet: if it did not come in time.
            LinkLost: if the link was lost.
            QueueInUse: if a coordinator of this federation is running.
            UsageError: if the federation has messages of a real run.
        """
        limit_s = self.options.patience_s if within_s is None else within_s
        end = self._now() + limit_s
        while True:
            self._news.clear()
            if self._reading.done():
                self._reading.result()
            result = find()
            if result is not None:
                return result
            left_s = end - self._now()
            if left_s <= 0:
                raise Unmet(
                    f"the worker sent no {what} within {limit_s:g} s; {self._last_heartbeat()}"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _POLL_S)):
                    await self._news.wait()
                continue
            if within_s is None and await self.gone() and find() is None:
                raise Unmet(f"the worker sent no {what} and no longer consumes from its inbox")

    def _last_heartbeat(self) -> str:
        if not (signs := signs_of_life(self.messages)):
            return "the worker sent no heartbeat"
        at, message = signs[-1]
        ago_s = self._now() - at
        return f"the worker's last heartbeat, {ago_s:.1f} s ago, says {at_work_on(message)}"

    def received(self, kind: type[_T], since: int = 0) -> Iterator[_T]:
        """Yield the messages of one kind, ignoring the first ``since`` messages."""
        later = (each.message for each in self.messages[since:])
        return (message for message in later if isinstance(message, kind))

    async def next(
        self,
        kind: type[_T],
        since: int,
        what: str,
        accept: Callable[[_T], bool] = lambda _: True,
        *,
        within_s: float | None = None,
    ) -> _T:
        """Wait as ``until`` does for a message of one kind after the first ``since`` messages."""

        def find() -> _T | None:
            return next((each for each in self.received(kind, since) if accept(each)), None)

        return await self.until(find, what, within_s=within_s)

    def updates_of(self, sent: SentFit) -> list[ReceivedUpdate]:
        """Return the updates of a ``fit`` so far, with the payload that each carried itself."""
        work = sent.fit.run, sent.fit.round, sent.fit.base
        return [
            ReceivedUpdate(message, payload)
            for _, message, payload in self.messages[sent.since :]
            if isinstance(message, Update) and (message.run, message.round, message.base) == work
        ]

    def failure_of(self, sent: SentFit) -> Failure | None:
        """Return the worker's report that it could not do the work, if it sent one."""
        work = sent.fit.run, sent.fit.round
        return next(
            (each for each in self.received(Failure) if (each.run, each.round) == work), None
        )

    def accepted(self, sent: SentFit) -> str | None:
        """Return the evidence that the worker accepted work that it had to refuse, if any."""
        if self.updates_of(sent):
            return "an update"
        if self.failure_of(sent):
            return None
        work = sent.fit.run, sent.fit.round
        for message in self.received(Heartbeat, sent.since):
            at_work = message.state not in ("idle", "receiving")
            if at_work and (message.run, message.round) == work:
                return f"a heartbeat, {at_work_on(message)}"
        return None

    async def gone(self) -> bool:
        """Return whether the worker's inbox has no consumer any more."""
        if self.worker is None:
            return True
        counts = await self.link.counts(self.topology.inbox(self.worker))
        return counts is None or not counts.consumers
