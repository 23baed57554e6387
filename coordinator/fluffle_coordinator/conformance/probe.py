"""The coordinator that is played: it sends what a scenario says, and keeps what a worker answers.

It declares and binds what a real one does, and answers every hello with a welcome. Beyond that it
does nothing by itself: no resend, no deadline, no average. Every round brings the same weights.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgpack
import numpy as np

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol.codec import encode, pack, read_groups
from fluffle_common.protocol.messages import (
    Evaluate,
    Evaluation,
    FirstWeights,
    Fit,
    Heartbeat,
    Message,
    Plan,
    Update,
    Welcome,
    WithTensors,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.transfer import Assembly
from fluffle_common.tensors.groups import Groups
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.base import Link, Properties, Unroutable
from fluffle_common.transport.parts import PartsGone, fetch
from fluffle_coordinator.conformance.findings import Taken, Unmet
from fluffle_coordinator.conformance.listener import RUNS, Asked, Conduct, Listener
from fluffle_coordinator.strategy.contribution import check_announced, decode_contribution

_T = TypeVar("_T")
_MAX_MODEL_BYTES = 8 * 2**30
LARGE = "conformance/large"
"""The name of the tensor that makes a small model travel in parts, and of how many floats."""
LARGE_FLOATS = 5 * 2**20 // 4


def a_name() -> str:
    """Return a name that was never used, as for weights or a run."""
    return uuid.uuid4().hex[:12]


class Probe(Listener):
    """Plays a coordinator to one worker.

    Args:
        link: the way to the broker.
        topology: the names on it.
        how: how to conduct the examination.
    """

    def __init__(self, link: Link, topology: Topology, how: Conduct) -> None:
        super().__init__(link, topology, how, self._greet)
        self.run = RUNS + a_name()
        self.round = 0
        self.weights: Weights = {}

    async def _greet(self) -> None:
        assert self.worker is not None
        await self.link.bind(self.topology.bindings_of(self.worker))
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

    # --- what comes back -----------------------------------------------------------------------

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
                await self.idle()  # whatever else was under way has arrived
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
            whole = Assembly(message.transfer, _MAX_MODEL_BYTES)
            outbox = self.topology.outbox(message.worker)
            await fetch(self.link, outbox, whole, self.topology.rejected)
            return whole.payload()
        except MalformedMessage as wrong:
            raise Unmet(f"parts that are not those announced: {wrong}") from None

    async def first_weights(self, since: int) -> Groups:
        """Wait for first weights, and read them, with what is beside them."""

        def find() -> tuple[FirstWeights, memoryview] | None:
            later = (one for one in self.answers[since:] if one.message.run == self.run)
            return next(
                ((one, inside) for one, inside in later if isinstance(one, FirstWeights)), None
            )

        message, inside = await self.until(find, "first_weights")
        try:
            return read_groups(message.tensors, await self._payload(message, inside))
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
        for _ in range(2):  # the first answer may have been under way
            since = len(self.signs)
            await self.welcome()
            await self.sign(Heartbeat, since, "heartbeat after a welcome")


def altered(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """Return a body with other keys in its header.

    Its padding goes, which the document allows.
    """
    header, payload = msgpack.unpackb(body)
    header.pop("pad", None)
    changed: bytes = msgpack.packb([{**header, **changes}, payload])
    return changed
