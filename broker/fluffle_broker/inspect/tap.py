"""Following the traffic of a federation live, through copies.

A tap must change nothing, but it is a queue. If it were the only queue bound to a key, a message
under that key would count as delivered: an update published while ``updates`` does not exist would
reach the tap instead of ``unrouted``. A tap is therefore bound only to keys that another queue is
bound to. It checks this again every ``LOOK_AGAIN_S`` seconds, and notices only then that a queue
has expired (an inbox does after 30 minutes without a consumer).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from dataclasses import dataclass

from fluffle_broker.inspect.decode import DecodedMessage, decode_message
from fluffle_common.concurrency import run_all
from fluffle_common.protocol.messages import Heartbeat, Hello, ToWorker, kinds_of
from fluffle_common.protocol.topology import PRESENCE_KINDS, UPDATE_KINDS, Binding, Topology
from fluffle_common.transport.base import Delivery, Link

LOOK_AGAIN_S = 10.0
# The interval as long as there is nothing to bind to, because the federation has no queues yet.
LOOK_SOON_S = 1.0
WORK_KINDS = kinds_of(ToWorker)
KINDS = tuple(dict.fromkeys((*WORK_KINDS, *UPDATE_KINDS, *PRESENCE_KINDS, "part")))
_WITH_A_WORKER = ("hello", "heartbeat")


@dataclass(frozen=True)
class Wanted:
    """The messages to show."""

    kinds: frozenset[str] = frozenset()  # an empty set stands for all but heartbeats
    worker: str | None = None  # shows those from and to this worker only
    parts: bool = False  # whether to copy the parts of updates; those of models always are

    def takes(self, decoded: DecodedMessage) -> bool:
        """Return whether to show a message; some are read only to learn of new workers."""
        # The bindings leave out work for other workers; a message may not list all its recipients.
        if (
            self.worker is not None
            and not is_work(decoded)
            and self.worker not in workers_of(decoded)
        ):
            return False
        if decoded.kind in self.kinds or (self.parts and decoded.kind == "part"):
            return True
        return not self.kinds and decoded.kind != "heartbeat"

    def lists(self, decoded: DecodedMessage) -> bool:
        """Return whether a message that is shown gets a line; parts only do on request."""
        return decoded.kind != "part" or "part" in self.kinds


def workers_of(decoded: DecodedMessage) -> tuple[str, ...]:
    """Return the recipients of work, only the first if there are many, else the sender."""
    if is_work(decoded):
        return decoded.delivery.keys
    return (decoded.worker or decoded.delivery.keys[0].partition(".")[2],)


def is_work(decoded: DecodedMessage) -> bool:
    """Return whether a message goes from the coordinator to workers."""
    return decoded.delivery.exchange.endswith(".work")


def bindings(
    topology: Topology, wanted: Wanted, queue: str, existing: Collection[str]
) -> set[Binding]:
    """Return the bindings of a tap: only keys that route to one of the ``existing`` queues."""
    result: set[Binding] = set()
    kinds = wanted.kinds or set(KINDS)
    ending = wanted.worker or "#"
    for target, all_kinds in (
        (topology.updates, UPDATE_KINDS),
        (topology.presence, PRESENCE_KINDS),
    ):
        for kind in all_kinds if target in existing else ():
            if kind in kinds:
                result.add(Binding(queue, topology.results, f"{kind}.{ending}"))
            if kind in _WITH_A_WORKER and wanted.worker is None:  # to learn of new workers
                result.add(Binding(queue, topology.results, f"{kind}.#"))
    for name in existing:
        inbox, outbox = topology.inbox(""), topology.outbox("")
        worker = name.removeprefix(inbox) if name.startswith(inbox) else name.removeprefix(outbox)
        if wanted.worker not in (None, worker):
            continue
        if name.startswith(inbox) and kinds & {*WORK_KINDS, "part"}:
            result.add(Binding(queue, topology.work, worker))
        if name.startswith(outbox) and wanted.parts:
            result.add(Binding(queue, topology.results, f"part.{worker}"))
    return result


class Tap:
    """A tap on one link.

    ``link`` must be used for nothing else. ``workers`` are those that are known; others are noticed
    by their hellos and heartbeats. ``show`` is called with each message to show.
    """

    def __init__(
        self,
        link: Link,
        topology: Topology,
        wanted: Wanted,
        workers: Iterable[str],
        show: Callable[[DecodedMessage], None],
    ) -> None:
        self._link, self._topology, self._wanted = link, topology, wanted
        self._workers = set(workers) if wanted.worker is None else {wanted.worker}
        self._show = show
        self._queue = topology.tap(uuid.uuid4().hex[:8])
        self._bound: set[Binding] = set()
        self._someone_new = asyncio.Event()

    async def run(self, ready: Callable[[], None]) -> None:
        """Follow the traffic until ``LinkLost``; call ``ready`` once nothing is missed."""
        async with contextlib.aclosing(await self._link.tap(self._queue, [])) as copies:
            await self._bind()
            ready()
            await run_all(self._read(copies), self._keep_bound())

    async def _read(self, copies: AsyncGenerator[Delivery]) -> None:
        async for copy in copies:
            decoded = decode_message(copy, self._topology.federation, values=False)
            if isinstance(decoded.message, Hello | Heartbeat) and self._wanted.worker is None:
                self._learn(decoded.message.worker)
            if self._wanted.takes(decoded):
                self._show(decoded)

    def _learn(self, worker: str) -> None:
        if worker not in self._workers:
            self._workers.add(worker)
            self._someone_new.set()

    async def _keep_bound(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S if self._bound else LOOK_SOON_S):
                    await self._someone_new.wait()
            self._someone_new.clear()
            await self._bind()

    async def _bind(self) -> None:
        """Update the tap's bindings to the queues that exist now."""
        existing = await self._existing()
        target = bindings(self._topology, self._wanted, self._queue.name, existing)
        if self._wanted.worker is None:  # a worker that comes back is noticed again
            self._workers = {w for w in self._workers if self._topology.inbox(w) in existing}
        # All of them: an exchange may have been deleted and declared again.
        await self._link.declare(target)
        for binding in self._bound - target:
            await self._link.unbind(binding)
        self._bound = target

    async def _existing(self) -> list[str]:
        """Return the queues to copy from; none before a coordinator has created the exchanges."""
        for exchange in (self._topology.work, self._topology.results):
            if not await self._link.exists(exchange):
                return []
        names = [self._topology.updates, self._topology.presence]
        names += [self._topology.inbox(worker) for worker in self._workers]
        if self._wanted.parts:
            names += [self._topology.outbox(worker) for worker in self._workers]
        return [name for name in names if await self._link.counts(name) is not None]
