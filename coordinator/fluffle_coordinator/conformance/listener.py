"""The receiving half of the played coordinator: collects, checks and awaits a worker's messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost, MalformedMessage, UsageError
from fluffle_common.protocol.codec import decode
from fluffle_common.protocol.messages import (
    Bye,
    Evaluation,
    Failure,
    FirstWeights,
    Fit,
    FromWorker,
    Heartbeat,
    Hello,
    Message,
    Update,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Delivery, Link
from fluffle_coordinator.conformance.findings import Heard, ReceivedUpdate, Unmet, at_work_on

_T = TypeVar("_T")
_PREFETCH = 100
_POLL_S = 2.0
_DURABLE = ("update", "evaluation", "first_weights", "failure")
RUNS = "conformance-"
"""Prefix of the ids of the runs played here."""


class Answer(NamedTuple):
    """A message from ``F.updates``, with the payload that it carried itself."""

    message: Update | Evaluation | FirstWeights
    payload: memoryview


@dataclass(frozen=True)
class ExamOptions:
    """The options of an examination.

    Args:
        worker: the id of the worker to examine; None takes the first that connects.
        large: add a tensor to the model, so that it travels in parts.
        twice: wait for a second start of the worker, and refuse it.
        wait_s: seconds to wait for the worker.
        patience_s: seconds to wait for an answer.
        tell: called with progress messages for people.
    """

    worker: str | None = None
    large: bool = False
    twice: bool = False
    wait_s: float = 600.0
    patience_s: float = 60.0
    tell: Callable[[str], object] = lambda _: None


@dataclass(frozen=True)
class SentFit:
    """A ``fit`` that was sent, and how many messages had arrived before it.

    Args:
        fit: the message.
        answers: the number of answers before it.
        presence: the number of presence messages before it.
    """

    fit: Fit
    answers: int
    presence: int


class Listener:
    """Reads what workers send and keeps the messages of the examined one.

    Args:
        link: the link to the broker.
        topology: the names on the broker.
        options: the options of the examination.
        greeted: called at each hello of the worker, or at its first heartbeat if that comes first.
    """

    def __init__(
        self,
        link: Link,
        topology: Topology,
        options: ExamOptions,
        greeted: Callable[[], Awaitable[None]],
    ) -> None:
        self.link, self.topology, self.options = link, topology, options
        self.worker = options.worker
        self.presence: list[Heard] = []
        self.answers: list[Answer] = []
        self.faults: list[str] = []  # of any message; the scenario "well formed" reports them
        self._greeted = greeted
        self._news = asyncio.Event()
        self._now = asyncio.get_running_loop().time

    async def read(self) -> None:
        """Read what workers send until the link is lost.

        Raises:
            LinkLost: if the link was lost.
            QueueInUse: if a coordinator of this federation is running.
            UsageError: if the federation has messages of a real run.
        """
        names = self.topology
        presence = await self.link.consume(names.presence, prefetch=_PREFETCH, exclusive=True)
        updates = await self.link.consume(names.updates, prefetch=_PREFETCH)

        async def take_all(deliveries: AsyncIterator[Delivery]) -> None:
            async for delivery in deliveries:
                await self._take(delivery)

        await run_all(take_all(presence), take_all(updates))
        raise LinkLost("the link was lost")

    async def _take(self, delivery: Delivery) -> None:
        try:
            message, payload = decode(delivery.body, self.topology.federation)
        except MalformedMessage as why:
            self.faults.append(f"in {delivery.queue}: {why}")
            delivery.ack()
            self._news.set()
            return
        if not isinstance(message, FromWorker):
            return delivery.ack()  # the echo of an earlier coordinator
        self._check_is_ours(message)
        delivery.ack()
        present = isinstance(message, Hello | Heartbeat) and self.worker in (None, message.worker)
        if present and (isinstance(message, Hello) or not self.presence):
            self.worker = message.worker
            await self._greeted()
        if message.worker != self.worker:
            return
        self._check_envelope(message, delivery)
        if isinstance(message, Hello | Heartbeat | Bye | Failure):
            self.presence.append(Heard(self._now(), message))
        elif isinstance(message, Update | Evaluation | FirstWeights):
            self.answers.append(Answer(message, payload))
        self._news.set()

    def _check_is_ours(self, message: Message) -> None:
        """Check that a message is not the work of a real run, which must not be consumed."""
        if not isinstance(message, Update | Evaluation | FirstWeights):
            return
        if not message.run.startswith(RUNS):
            raise UsageError(
                f"federation {self.topology.federation} has messages of run {message.run}; "
                "give a federation that nothing else uses with --federation"
            )

    def _check_envelope(self, message: Message, delivery: Delivery) -> None:
        """Check the routing key and the AMQP properties."""
        kind, properties = message.kind, delivery.properties
        key = f"{kind}.{self.worker}"
        if key not in delivery.keys:
            self.faults.append(f"{kind} came under the routing key {delivery.keys[0]}, not {key}")
        if properties.type != kind:
            self.faults.append(f"{kind} has the AMQP type '{properties.type}'")
        if not properties.message_id:
            self.faults.append(f"{kind} has no message_id")
        if kind in _DURABLE and not properties.durable:
            self.faults.append(f"{kind} is not persistent (delivery_mode 2)")

    # --- waiting -------------------------------------------------------------------------------

    async def until(
        self, find: Callable[[], _T | None], what: str, *, within_s: float | None = None
    ) -> _T:
        """Wait until ``find`` returns something other than None, and return that.

        Args:
            find: searches the messages received so far.
            what: the name of what is awaited, for error messages.
            within_s: seconds to wait. None: the patience of the examination, or until nobody
                consumes from the worker's inbox.

        Raises:
            Unmet: if it did not come in time.
        """
        limit_s = self.options.patience_s if within_s is None else within_s
        end = self._now() + limit_s
        while True:
            self._news.clear()
            result = find()
            if result is not None:
                return result
            left_s = end - self._now()
            if left_s <= 0:
                raise Unmet(f"no {what} within {limit_s:g} s; {self._last_heartbeat()}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _POLL_S)):
                    await self._news.wait()
                continue
            if within_s is None and await self.gone() and find() is None:
                raise Unmet(f"no {what}: the worker is gone; its inbox has no consumer")

    def _last_heartbeat(self) -> str:
        for at, message in reversed(self.presence):
            if isinstance(message, Hello | Heartbeat):
                return f"{self._now() - at:.1f} s ago the worker was {at_work_on(message)}"
        return "no heartbeat came"

    async def next_presence(
        self, kind: type[_T], since: int, what: str, *, within_s: float | None = None
    ) -> _T:
        """Wait for a presence message of this kind, ignoring the first ``since`` messages."""

        def find() -> _T | None:
            later = (each.message for each in self.presence[since:])
            return next((message for message in later if isinstance(message, kind)), None)

        return await self.until(find, what, within_s=within_s)

    def updates_of(self, sent: SentFit) -> list[ReceivedUpdate]:
        """Return the updates of a ``fit`` so far, with the payload that each carried itself."""
        work = sent.fit.run, sent.fit.round, sent.fit.base
        return [
            ReceivedUpdate(message, payload)
            for message, payload in self.answers[sent.answers :]
            if isinstance(message, Update) and (message.run, message.round, message.base) == work
        ]

    def failure_of(self, sent: SentFit) -> Failure | None:
        """Return the worker's report that it could not do the work, if it sent one."""
        work = sent.fit.run, sent.fit.round
        failures = (each.message for each in self.presence if isinstance(each.message, Failure))
        return next((each for each in failures if (each.run, each.round) == work), None)

    def accepted(self, sent: SentFit) -> str | None:
        """Return the evidence that the worker accepted work that it had to refuse, if any."""
        if self.updates_of(sent):
            return "an update"
        if self.failure_of(sent):
            return None
        for _, message in self.presence[sent.presence :]:
            if isinstance(message, Heartbeat) and message.state != "idle":
                if (message.run, message.round) == (sent.fit.run, sent.fit.round):
                    return f"a heartbeat, {at_work_on(message)}"
        return None

    async def gone(self) -> bool:
        """Return whether the worker's inbox has no consumer any more."""
        if self.worker is None:
            return True
        counts = await self.link.counts(self.topology.inbox(self.worker))
        return counts is None or not counts.consumers
