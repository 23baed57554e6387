"""What a worker says to the coordinator that is played: kept, looked at, waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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
from fluffle_coordinator.conformance.findings import Sign, Taken, Unmet, at_work_on

_T = TypeVar("_T")
_PREFETCH = 100
_LOOK_EVERY_S = 2.0
_DURABLE = ("update", "evaluation", "first_weights", "failure")
RUNS = "conformance-"
"""What the ids of the runs begin with that are played here."""


class Answer(NamedTuple):
    """What came in ``F.updates``, with the payload that was in the message itself."""

    message: Update | Evaluation | FirstWeights
    payload: memoryview


@dataclass(frozen=True)
class Conduct:
    """How an examination is conducted.

    Args:
        worker: whom to examine; None takes the first that says hello.
        large: add a tensor to the model, so that it travels in parts.
        twice: wait for a second start of the worker, and refuse it.
        patience_s: how long an answer may take, in seconds.
        tell: told what happens, in a line.
    """

    worker: str | None = None
    large: bool = False
    twice: bool = False
    patience_s: float = 60.0
    tell: Callable[[str], object] = lambda _: None


@dataclass(frozen=True)
class Asked:
    """Work that was sent.

    Args:
        fit: the message.
        since: how many answers there were before.
        signs: how many signs of life.
    """

    fit: Fit
    since: int
    signs: int


class Listener:
    """Reads what workers send, and keeps what one of them says.

    Args:
        link: the way to the broker.
        topology: the names on it.
        how: how to conduct the examination.
        greeted: called when the worker says hello, or is heard for the first time.
    """

    def __init__(
        self,
        link: Link,
        topology: Topology,
        how: Conduct,
        greeted: Callable[[], Awaitable[None]],
    ) -> None:
        self.link, self.topology, self.how = link, topology, how
        self.worker = how.worker
        self.signs: list[Sign] = []
        self.answers: list[Answer] = []
        self.faults: list[str] = []  # what was wrong with messages, whatever they were for
        self._greeted = greeted
        self._news = asyncio.Event()
        self._now = asyncio.get_running_loop().time

    async def read(self) -> None:
        """Read what workers send, for ever.

        Raises:
            QueueInUse: if a coordinator of this federation is running.
            UsageError: if the federation has work of a real run.
        """
        names = self.topology
        presence = await self.link.consume(names.presence, prefetch=_PREFETCH, exclusive=True)
        updates = await self.link.consume(names.updates, prefetch=_PREFETCH)

        async def each(deliveries: Any) -> None:
            async for delivery in deliveries:
                await self._take(delivery)

        await run_all(each(presence), each(updates))
        raise LinkLost("the link was lost")

    async def _take(self, delivery: Delivery) -> None:
        try:
            message, payload = decode(delivery.body, self.topology.federation)
        except MalformedMessage as wrong:
            self.faults.append(f"in {delivery.queue}: {wrong}")
            delivery.ack()
            self._news.set()
            return
        if not isinstance(message, FromWorker):
            return delivery.ack()  # a coordinator that was here before talked to itself
        self._keep_off_real_runs(message)
        delivery.ack()
        present = isinstance(message, Hello | Heartbeat) and self.worker in (None, message.worker)
        if present and (isinstance(message, Hello) or not self.signs):
            self.worker = message.worker
            await self._greeted()
        if message.worker != self.worker:
            return
        self._check_envelope(message, delivery)
        if isinstance(message, Hello | Heartbeat | Bye | Failure):
            self.signs.append(Sign(self._now(), message))
        elif isinstance(message, Update | Evaluation | FirstWeights):
            self.answers.append(Answer(message, payload))
        self._news.set()

    def _keep_off_real_runs(self, message: Message) -> None:
        if not isinstance(message, Update | Evaluation | FirstWeights):
            return
        if not message.run.startswith(RUNS):
            raise UsageError(
                f"federation {self.topology.federation} has messages of run {message.run}; "
                "name a federation that is for this alone with --federation"
            )

    def _check_envelope(self, message: Message, delivery: Delivery) -> None:
        """Look at what travels beside the body."""
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
        """Return what ``find`` returns, once that is not None.

        Args:
            find: looks through what has come.
            what: what is waited for, in words.
            within_s: how long; None: as long as an answer may take, and no longer than there is
                somebody who reads the worker's inbox.

        Raises:
            Unmet: if it does not come.
        """
        limit_s = self.how.patience_s if within_s is None else within_s
        end = self._now() + limit_s
        while True:
            self._news.clear()
            found = find()
            if found is not None:
                return found
            left_s = end - self._now()
            if left_s <= 0:
                raise Unmet(f"no {what} within {limit_s:g} s; {self._last_sign()}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _LOOK_EVERY_S)):
                    await self._news.wait()
                continue
            if within_s is None and await self.gone() and find() is None:
                raise Unmet(f"no {what}: the worker is gone, nobody reads its inbox")

    def _last_sign(self) -> str:
        beats = [one for one in self.signs if isinstance(one.message, Hello | Heartbeat)]
        if not beats:
            return "there was no sign of life"
        at, message = beats[-1]
        assert isinstance(message, Hello | Heartbeat)
        return f"{self._now() - at:.1f} s ago the worker was {at_work_on(message)}"

    async def sign(
        self, kind: type[_T], since: int, what: str, *, within_s: float | None = None
    ) -> _T:
        """Wait for a sign of life of this kind, from number ``since`` on."""

        def find() -> _T | None:
            later = (one.message for one in self.signs[since:])
            return next((message for message in later if isinstance(message, kind)), None)

        return await self.until(find, what, within_s=within_s)

    def updates_of(self, asked: Asked) -> list[Taken]:
        """Return the answers to a ``fit`` so far, with the payload that was in the message."""
        of = asked.fit.run, asked.fit.round, asked.fit.base
        return [
            Taken(message, payload)
            for message, payload in self.answers[asked.since :]
            if isinstance(message, Update) and (message.run, message.round, message.base) == of
        ]

    def failure_of(self, asked: Asked) -> Failure | None:
        """Return the worker's word that it could not do the work, if it gave that."""
        of = asked.fit.run, asked.fit.round
        failures = (one.message for one in self.signs if isinstance(one.message, Failure))
        return next((one for one in failures if (one.run, one.round) == of), None)

    def took(self, asked: Asked) -> str | None:
        """Return what shows that the worker has taken work that it had to refuse, if it has."""
        if self.updates_of(asked):
            return "an update"
        if self.failure_of(asked):
            return None
        for _, message in self.signs[asked.signs :]:
            if isinstance(message, Heartbeat) and message.state != "idle":
                if (message.run, message.round) == (asked.fit.run, asked.fit.round):
                    return f"a heartbeat, {at_work_on(message)}"
        return None

    async def gone(self) -> bool:
        """Whether nobody reads the worker's inbox any more."""
        if self.worker is None:
            return True
        there = await self.link.counts(self.topology.inbox(self.worker))
        return there is None or not there.consumers
