"""The played coordinator: sends what a scenario tells it to, and awaits and checks the answers.

Like a real coordinator, it answers every hello with a welcome. It does nothing else on its own: no
resending, no deadlines, no averaging. Every round sends the same weights.
"""

from __future__ import annotations

import uuid
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgpack
import numpy as np

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.messages import (
    Evaluate,
    Evaluation,
    Failure,
    FirstWeights,
    Fit,
    Heartbeat,
    InitRequest,
    Message,
    Plan,
    Transfer,
    Update,
    Welcome,
    WithTensors,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer_parts import Assembly, pack
from fluffle_common.protocol.wire_format import describe, encode, read_groups
from fluffle_common.tensors.groups import NO_GROUPS, Groups
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import HeaderValue, Link, Properties, Unroutable
from fluffle_common.transport.fetch_parts import PartsGone, fetch
from fluffle_coordinator.conformance.listener import RUNS, ExamOptions, Listener, SentFit
from fluffle_coordinator.conformance.received import ReceivedUpdate, Unmet
from fluffle_coordinator.strategy.update_checks import EVERYTHING, check_announced, decode_update

_T = TypeVar("_T")
_LARGE = {"conformance/large": np.zeros(5 * 2**20 // 4, np.float32)}
"""The tensor that makes a small model travel in parts (``--large``)."""


def fresh_name() -> str:
    """Return a new unique name, for weights, a run or a session."""
    return uuid.uuid4().hex[:12]


class Probe(Listener):
    """Plays the coordinator of one worker."""

    def __init__(self, link: Link, topology: Topology, options: ExamOptions) -> None:
        super().__init__(link, topology, options)
        self.run = RUNS + fresh_name()
        self.round = 0
        self.weights: Weights = {}
        self.frozen: Weights = {}

    async def greet(self) -> None:
        """Bind the worker's queues and send a welcome."""
        assert self.worker is not None
        await self.link.bind(self.topology.bindings_of(self.worker))
        await self.welcome()

    # --- sending -------------------------------------------------------------------------------

    async def send(
        self,
        message: Message,
        *,
        beside: Groups = NO_GROUPS,
        changes: Mapping[str, Any] | None = None,
        lose: Container[int] = (),
    ) -> None:
        """Send a message to the worker; work is sent with the weights.

        ``beside`` has tensors of other groups, ``changes`` the header keys to add or replace, valid
        or not, and ``lose`` the numbers of the parts to leave out.
        """
        transfer: Transfer | None = None
        parts: Iterable[bytes] = ()
        if isinstance(message, WithTensors):
            transfer, body, parts = pack(message, self.weights, beside)
        else:
            body = encode(message)
        headers = describe(message)
        await self.deliver(altered(body, changes) if changes else body, message.kind, headers)
        for number, part in enumerate(parts):
            if number not in lose:
                assert transfer is not None
                await self.deliver(part, "part", {"part": number, "parts": transfer.parts})

    async def deliver(
        self, body: bytes, kind: str, headers: Mapping[str, HeaderValue] = MappingProxyType({})
    ) -> None:
        """Publish any bytes to the worker's inbox like a coordinator; ``Unmet`` if it is gone."""
        assert self.worker is not None
        properties = Properties(
            type=kind,
            message_id=f"{kind}/{fresh_name()}",
            headers={**headers, "bytes": len(body)},
            durable=False,
        )
        try:
            await self.link.publish(
                body, properties, exchange=self.topology.work, keys=[self.worker]
            )
        except Unroutable:
            raise Unmet(
                f"the worker's inbox, the queue {self.topology.inbox(self.worker)}, is gone"
            ) from None

    async def welcome(self) -> None:
        """Send a welcome, which the worker answers with a heartbeat."""
        await self.send(Welcome(**self.of_run(), round=max(self.round, 1), rounds=1000))

    def next_fit(self, **fields: Any) -> Fit:
        """Return the work of the next round; ``fields`` override the defaults.

        As in synchronous rounds, the sequence is the round.
        """
        number = fields.pop("round", self.round + 1)
        self.round = max(self.round, number)
        defaults: dict[str, Any] = {
            "base": fresh_name(),
            "sequence": number,
            "evaluate": False,
            "plan": Plan(epochs=1),
        }
        return Fit(**self.of_run(), round=number, **defaults | fields)

    async def ask(self, fit: Fit, **options: Any) -> SentFit:
        """Send work; ``options`` are those of ``send``."""
        sent = self.mark_sent(fit)
        await self.send(fit, **options)
        return sent

    def mark_sent(self, fit: Fit) -> SentFit:
        """Return a record of ``fit``, which is sent next."""
        return SentFit(fit, len(self.messages))

    def of_run(self) -> dict[str, Any]:
        """Return the keys that name the federation and the run."""
        return {"federation": self.topology.federation, "run": self.run}

    def begin_with(self, weights: Weights, frozen: Weights) -> None:
        """Use these weights in every round; note the worker's own frozen tensors."""
        self.frozen = frozen
        self.weights = {**weights, **(_LARGE if self.options.large else {})}

    # --- receiving -----------------------------------------------------------------------------

    async def update(self, sent: SentFit, *, crossed: bool = False) -> ReceivedUpdate:
        """Wait for the update of a ``fit``, fetch its parts, and check it as a coordinator does.

        If other work has ``crossed`` it, the worker may have purged its outbox for that; if the
        parts are gone, the ``fit`` is then sent again.

        Raises:
            Unmet: if no update came, or a coordinator would reject it.
        """

        def find() -> list[ReceivedUpdate] | None:
            if failure := self.failure_of(sent):
                raise Unmet(f"the worker sent a failure instead of an update: {failure.reason}")
            return self.updates_of(sent) or None

        (update, inline), *_ = await self.until(find, f"update of round {sent.fit.round}")
        try:
            payload = await self._payload(update, inline, sent.fit.plan)
        except PartsGone as why:
            if crossed:
                await self.idle()  # by then, everything else in transit has arrived
                return await self.update(await self.ask(sent.fit))
            raise Unmet(f"the worker sent an update without its parts: {why}") from None
        try:
            decode_update(update, payload, self.weights, sent.fit.plan)
        except MalformedMessage as why:
            raise Unmet(
                f"the worker sent an update that a coordinator rejects ({why.cause}): {why}"
            ) from None
        return ReceivedUpdate(update, payload)

    async def _payload(
        self, message: Update | FirstWeights, inline: memoryview, plan: Plan = EVERYTHING
    ) -> memoryview:
        """Return a message's payload: the inline one, or the parts; they may be ``PartsGone``."""
        if message.transfer is None:
            return inline
        try:
            check_announced(message, self.weights or None, plan)
            assembly = Assembly(message.transfer)
            outbox = self.topology.outbox(message.worker)
            await fetch(self.link, outbox, assembly, self.topology.rejected)
            return assembly.payload()
        except MalformedMessage as why:
            raise Unmet(
                f"the worker sent parts that do not match their announcement: {why}"
            ) from None

    async def first_weights(self) -> tuple[FirstWeights, Groups]:
        """Request first weights; return the message, and its tensors by group."""
        since = len(self.messages)
        await self.send(InitRequest(**self.of_run(), seed=7))

        def find() -> tuple[FirstWeights, memoryview] | None:
            for _, message, inline in self.messages[since:]:
                if isinstance(message, FirstWeights) and message.run == self.run:
                    return message, inline
                if isinstance(message, Failure) and message.run == self.run:
                    reason = message.reason
                    raise Unmet(f"the worker sent a failure instead of first weights: {reason}")
            return None

        message, inline = await self.until(find, "first_weights")
        try:
            payload = await self._payload(message, inline)
            return message, read_groups(message.tensors, payload)
        except (MalformedMessage, PartsGone) as why:
            raise Unmet(f"the worker sent first weights that cannot be read: {why}") from None

    async def evaluation(self) -> Evaluation:
        """Send an ``evaluate`` under a new base, and wait for the answer.

        A worker reads its inbox in order, so by then it has read everything sent before.
        """
        base, since = fresh_name(), len(self.messages)
        await self.send(Evaluate(**self.of_run(), round=self.round, base=base))
        return await self.next(Evaluation, since, "evaluation", lambda each: each.base == base)

    async def heartbeat(self, state: str | None = None, what: str = "heartbeat") -> Heartbeat:
        """Send a welcome, and wait for a heartbeat, in this state if one is given."""
        since = len(self.messages)
        await self.welcome()
        return await self.next(Heartbeat, since, what, lambda beat: state in (None, beat.state))

    async def idle(self) -> Heartbeat:
        """Wait until the worker reports that it is idle; its last answer is then confirmed."""
        return await self.heartbeat("idle", "heartbeat in state idle")

    async def read_by_now(self) -> None:
        """Wait until the worker has read everything sent so far."""
        for _ in range(2):  # the first heartbeat may already have been in transit
            await self.heartbeat(what="heartbeat after a welcome")


def altered(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """Return a message body with keys of its header added or replaced, and without padding."""
    header, payload = msgpack.unpackb(body)
    header.pop("pad", None)
    changed: bytes = msgpack.packb([{**header, **changes}, payload])
    return changed
