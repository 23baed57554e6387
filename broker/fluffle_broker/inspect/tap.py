"""Following the traffic of a federation live, through copies.

Looking must change nothing. A tap is a queue, so a message that no other queue is bound for would
reach the tap alone and pass as delivered: an update published while ``updates`` is gone would not
go to ``unrouted``. So a tap is bound only to the very keys that another queue is bound for, and
that is looked at again every ``LOOK_AGAIN_S``: what remains is that a queue which expires (an inbox
does after 30 minutes of absence) is missed by so much.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass

from fluffle_broker.inspect.decode import DecodedMessage, decode_message
from fluffle_common.concurrency import run_all
from fluffle_common.protocol.messages import Heartbeat, Hello, ToWorker, kinds_of
from fluffle_common.protocol.topology import PRESENCE_KINDS, UPDATE_KINDS, Binding, Topology
from fluffle_common.transport.base import Delivery, Link

LOOK_AGAIN_S = 10.0
# While there is nothing to be bound to: nobody has come to this federation yet.
LOOK_SOON_S = 1.0
WORK_KINDS = kinds_of(ToWorker)
KINDS = tuple(dict.fromkeys((*WORK_KINDS, *UPDATE_KINDS, *PRESENCE_KINDS, "part")))
_WITH_A_WORKER = ("hello", "heartbeat")


@dataclass(frozen=True)
class Wanted:
    """What to show.

    Args:
        kinds: messages of these kinds; empty stands for all but heartbeats.
        worker: only what is of, or for, this worker.
        parts: fetch the parts of updates too; those of the coordinator's work come anyway.
    """

    kinds: frozenset[str] = frozenset()
    worker: str | None = None
    parts: bool = False

    def takes(self, reading: DecodedMessage) -> bool:
        """Whether a message is wanted at all: some are fetched only for what they tell."""
        # Work for others does not get here; and where it is for many, not all of them are named.
        if self.worker is not None and not is_work(reading) and self.worker not in whom(reading):
            return False
        if reading.kind in self.kinds or (self.parts and reading.kind == "part"):
            return True
        return not self.kinds and reading.kind != "heartbeat"

    def lists(self, reading: DecodedMessage) -> bool:
        """Whether a message that is wanted gets a line of its own."""
        return reading.kind != "part" or "part" in self.kinds


def whom(reading: DecodedMessage) -> tuple[str, ...]:
    """Return the workers that a message is for (the first, where they are many), or is of."""
    if is_work(reading):
        return reading.delivery.keys
    return (reading.worker or reading.delivery.keys[0].partition(".")[2],)


def is_work(reading: DecodedMessage) -> bool:
    """Whether it goes from the coordinator to workers."""
    return reading.delivery.exchange.endswith(".work")


def bindings(
    topology: Topology, wanted: Wanted, queue: str, existing: Iterable[str]
) -> set[Binding]:
    """Return what a tap is to be bound to.

    Args:
        topology: the names of the federation.
        wanted: what to show.
        queue: the tap.
        existing: the queues that are there: no key is tapped that leads to none of them.
    """
    there = set(existing)
    found: set[Binding] = set()
    kinds = wanted.kinds or set(KINDS)
    ending = wanted.worker or "#"
    for target, all_kinds in (
        (topology.updates, UPDATE_KINDS),
        (topology.presence, PRESENCE_KINDS),
    ):
        for kind in all_kinds if target in there else ():
            if kind in kinds:
                found.add(Binding(queue, topology.results, f"{kind}.{ending}"))
            if kind in _WITH_A_WORKER and wanted.worker is None:  # it tells of workers
                found.add(Binding(queue, topology.results, f"{kind}.#"))
    for name in there:
        inbox, outbox = topology.inbox(""), topology.outbox("")
        worker = name.removeprefix(inbox) if name.startswith(inbox) else name.removeprefix(outbox)
        if wanted.worker not in (None, worker):
            continue
        if name.startswith(inbox) and kinds & {*WORK_KINDS, "part"}:
            found.add(Binding(queue, topology.work, worker))
        if name.startswith(outbox) and wanted.parts:
            found.add(Binding(queue, topology.results, f"part.{worker}"))
    return found


class Tap:
    """One tap over one link.

    Args:
        link: a link of its own.
        topology: the names of the federation.
        wanted: what to show.
        workers: who is known to be in the federation; more are learnt from what they say.
        show: told each message that is wanted.
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
        """Follow the traffic until cancelled.

        Args:
            ready: called when everything from here on will be seen.

        Raises:
            LinkLost: when the link is lost.
        """
        async with contextlib.aclosing(await self._link.tap(self._queue, [])) as copies:
            await self._bind()
            ready()
            await run_all(self._read(copies), self._keep_bound())

    async def _read(self, copies: AsyncGenerator[Delivery]) -> None:
        async for copy in copies:
            reading = decode_message(copy, self._topology.federation, values=False)
            if isinstance(reading.message, Hello | Heartbeat) and self._wanted.worker is None:
                self._learn(reading.message.worker)
            if self._wanted.takes(reading):
                self._show(reading)

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
        """Bind the tap to what it should be bound to now, and to nothing else."""
        existing = await self._existing()
        target = bindings(self._topology, self._wanted, self._queue.name, existing)
        if self._wanted.worker is None:  # the others say who they are again, should they come back
            self._workers = {w for w in self._workers if self._topology.inbox(w) in existing}
        await self._link.declare(target - self._bound)
        for gone in self._bound - target:
            await self._link.unbind(gone)
        self._bound = target

    async def _existing(self) -> list[str]:
        names = [self._topology.updates, self._topology.presence]
        names += [self._topology.inbox(worker) for worker in self._workers]
        if self._wanted.parts:
            names += [self._topology.outbox(worker) for worker in self._workers]
        return [name for name in names if await self._link.counts(name) is not None]
