"""The coordinator that is played: it sends what a scenario says, and keeps what a worker answers.

It declares and binds what a real one does, and answers every hello with a welcome. Beyond that it
does nothing by itself: no resend, no deadline, no average. Every round brings the same weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy as np

from fluffle_common.concurrency import run_all
from fluffle_common.errors import LinkLost, MalformedMessage, UsageError
from fluffle_common.protocol.codec import decode, encode, pack, read_tensors
from fluffle_common.protocol.messages import (
    Bye,
    Evaluate,
    Evaluation,
    Failure,
    FirstWeights,
    Fit,
    FromWorker,
    Heartbeat,
    Hello,
    Message,
    Plan,
    Update,
    Welcome,
    WithTensors,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Delivery, Link, Properties, Unroutable
from fluffle_common.transport.messaging import PartsGone, fetch
from fluffle_coordinator.conformance.findings import Sign, Taken, Unmet, at_work_on
from fluffle_coordinator.strategy.contribution import check_announced, decode_contribution

_T = TypeVar("_T")
_PREFETCH = 100
_LOOK_EVERY_S = 2.0
_MAX_MODEL_BYTES = 8 * 2**30
_DURABLE = ("update", "evaluation", "first_weights", "failure")
RUNS = "conformance-"
"""What the ids of the runs begin with that are played here."""
LARGE = "conformance/large"
"""The name of the tensor that makes a small model travel in parts, and of how many floats."""
LARGE_FLOATS = 5 * 2**20 // 4


def a_name() -> str:
    """Return a name that was never used, as for weights or a run."""
    return uuid.uuid4().hex[:12]


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


class Probe:
    """Plays a coordinator to one worker.

    Args:
        link: the way to the broker.
        topology: the names on it.
        how: how to conduct the examination.
    """

    def __init__(self, link: Link, topology: Topology, how: Conduct) -> None:
        self.link, self.topology, self.how = link, topology, how
        self.worker = how.worker
        self.run = RUNS + a_name()
        self.round = 0
        self.weights: Weights = {}
        self.signs: list[Sign] = []
        self.answers: list[Answer] = []
        self.faults: list[str] = []  # what was wrong with messages, whatever they were for
        self._news = asyncio.Event()
        self._now = asyncio.get_running_loop().time

    # --- what comes in -------------------------------------------------------------------------

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
        if isinstance(message, Hello) and self.worker in (None, message.worker):
            self.worker = message.worker
            await self._greet(message.worker)
        if message.worker != self.worker:
            return
        self._check_envelope(message, delivery)
        if isinstance(message, Hello | Heartbeat | Bye | Failure):
            self.signs.append(Sign(self._now(), message))
        else:
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

    async def _greet(self, worker: str) -> None:
        await self.link.bind(self.topology.bindings_of(worker))
        await self.welcome()

    # --- what goes out -------------------------------------------------------------------------

    async def send(
        self,
        message: Message,
        weights: Weights | None = None,
        *,
        changes: Mapping[str, Any] | None = None,
        lose: Iterable[int] = (),
    ) -> None:
        """Send a message to the worker.

        Args:
            message: the header.
            weights: the tensors that it brings.
            changes: keys of the header to set besides, whatever they are.
            lose: which parts are not sent, if there are any.
        """
        bodies: list[bytes] = []
        if isinstance(message, WithTensors) and weights is not None:
            _, body, parts = pack(message, weights)
            lost = frozenset(lose)
            bodies = [part for number, part in enumerate(parts) if number not in lost]
        else:
            body = encode(message)
        await self.deliver(altered(body, changes) if changes else body, message.kind)
        for part in bodies:
            await self.deliver(part, "part")

    async def deliver(self, body: bytes, kind: str) -> None:
        """Put any bytes into the worker's inbox.

        Raises:
            Unmet: if the worker has no inbox any more.
        """
        assert self.worker is not None
        properties = Properties(type=kind, message_id=f"{kind}/{a_name()}", durable=False)
        try:
            await self.link.publish(
                body, properties, exchange=self.topology.work, keys=[self.worker]
            )
        except Unroutable:
            raise Unmet(f"{self.topology.inbox(self.worker)} is gone") from None

    async def welcome(self) -> None:
        """Say that the worker is in."""
        await self.send(Welcome(**self._of_run(), round=max(self.round, 1), rounds=1000))

    def next_fit(self, **fields: Any) -> Fit:
        """Return the work of the next round; ``fields`` are those that are not as ever."""
        number = fields.pop("round", self.round + 1)
        self.round = max(self.round, number)
        usual: dict[str, Any] = {"base": a_name(), "evaluate": False, "plan": Plan(epochs=1)}
        return Fit(**self._of_run(), round=number, **usual | fields)

    async def ask(self, fit: Fit, **how: Any) -> Asked:
        """Send work; see ``send`` for ``how``."""
        asked = self.asking(fit)
        await self.send(fit, self.weights, **how)
        return asked

    def asking(self, fit: Fit) -> Asked:
        """Note what there was before work is sent."""
        return Asked(fit, len(self.answers), len(self.signs))

    def _of_run(self) -> dict[str, Any]:
        return {"federation": self.topology.federation, "run": self.run}

    def begin_with(self, weights: Weights) -> None:
        """Use a worker's first weights, in every round."""
        large = {LARGE: np.zeros(LARGE_FLOATS, np.float32)} if self.how.large else {}
        self.weights = {**weights, **large}

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

    async def update(self, asked: Asked, *, crossed: bool = False) -> Taken:
        """Wait for the answer to a ``fit``, fetch its parts, and check it as a coordinator does.

        Args:
            asked: the work.
            crossed: other work was sent meanwhile, for whose answer the worker may have purged its
                outbox; if the parts are gone, the ``fit`` is sent again.

        Raises:
            Unmet: if none comes, or the coordinator would reject it.
        """

        def find() -> list[Taken] | None:
            if failed := self.failure_of(asked):
                raise Unmet(f"a failure instead of an update: {failed.reason}")
            return self.updates_of(asked) or None

        (update, inside), *_ = await self.until(find, f"update of round {asked.fit.round}")
        try:
            payload = await self._payload(update, inside)
        except PartsGone as why:
            if crossed:
                return await self.update(await self.ask(asked.fit))
            raise Unmet(f"an update without its parts: {why}") from None
        try:
            decode_contribution(update, payload, self.weights)
        except MalformedMessage as wrong:
            raise Unmet(f"an update that is rejected ({wrong.cause}): {wrong}") from None
        return Taken(update, payload)

    async def _payload(self, message: Update | FirstWeights, inside: memoryview) -> memoryview:
        """Return the payload of a message: the one inside it, or the parts of its transfer.

        Raises:
            PartsGone: if parts are missing.
            Unmet: if they are not what was announced.
        """
        if message.transfer is None:
            return inside
        try:
            check_announced(message, self.weights or None)
            return await fetch(
                self.link,
                self.topology.outbox(message.worker),
                message.transfer,
                _MAX_MODEL_BYTES,
                self.topology.rejected,
            )
        except MalformedMessage as wrong:
            raise Unmet(f"parts that are not those announced: {wrong}") from None

    async def first_weights(self, since: int) -> Weights:
        """Wait for first weights, and read them."""

        def find() -> tuple[FirstWeights, memoryview] | None:
            later = (one for one in self.answers[since:] if one.message.run == self.run)
            return next(
                ((one, inside) for one, inside in later if isinstance(one, FirstWeights)), None
            )

        message, inside = await self.until(find, "first_weights")
        try:
            return read_tensors(message.tensors, await self._payload(message, inside))
        except (MalformedMessage, PartsGone) as wrong:
            raise Unmet(f"first weights that cannot be read: {wrong}") from None

    async def evaluation(self, *, what: str = "evaluation") -> Evaluation:
        """Have the weights evaluated, under a new name, and return the answer.

        What was sent before has been read by then, since a worker reads its mail in order.
        """
        base, since = a_name(), len(self.answers)
        work = Evaluate(**self._of_run(), round=self.round, base=base)
        await self.send(work, self.weights)

        def find() -> Evaluation | None:
            later = (one.message for one in self.answers[since:])
            found = (one for one in later if isinstance(one, Evaluation))
            return next((one for one in found if one.base == base), None)

        return await self.until(find, what)

    async def idle(self) -> Heartbeat:
        """Wait until the worker says that it is idle: its last answer is confirmed by then."""
        since = len(self.signs)
        await self.welcome()

        def find() -> Heartbeat | None:
            later = (one.message for one in self.signs[since:])
            beats = (one for one in later if isinstance(one, Heartbeat))
            return next((one for one in beats if one.state == "idle"), None)

        return await self.until(find, "heartbeat that says idle")

    async def read_by_now(self) -> None:
        """Return when the worker has read all that was sent, and has spoken up since."""
        since = len(self.signs)
        await self.welcome()

        def find() -> bool | None:
            beats = [one for one in self.signs[since:] if isinstance(one.message, Heartbeat)]
            return len(beats) > 1 or None  # the first may have been under way

        await self.until(find, "second heartbeat after a welcome")

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


def altered(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """Return a body with other keys in its header.

    Its padding goes, which the document allows.
    """
    header, payload = msgpack.unpackb(body)
    header.pop("pad", None)
    changed: bytes = msgpack.packb([{**header, **changes}, payload])
    return changed
