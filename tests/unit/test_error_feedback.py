"""Error feedback of a worker on the in-memory broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np

from fluffle_common.protocol.events import Connected, RunEvent, Sent
from fluffle_common.protocol.messages import Compression, Fit, Plan, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode, read_tensors
from fluffle_common.tensors.compression import decompress
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.messaging import Route, send_tensors
from fluffle_worker.service import WorkerService
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.task import TrainResult

COUNT = 2000
TOPOLOGY = Topology("f")
HOW = "topk:0.1"
LEARNT = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
WEIGHTS = {"w": np.zeros(COUNT, np.float32)}


class Steps:
    """A task whose training always adds the same delta."""

    num_examples = 5

    def init(self, seed):
        return WEIGHTS

    def train(self, weights, plan, progress):
        return TrainResult({"w": weights["w"] + LEARNT}, self.num_examples)

    def evaluate(self, weights):
        return None


class Coordinator:
    """A coordinator of one worker that requests rounds and reads the updates."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker

    async def connect(self) -> None:
        self.link = await self.broker.open()
        await self.link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w")])
        self.updates = await self.link.consume(TOPOLOGY.updates, prefetch=1)

    async def ask(
        self, number: int, how: str | None = HOW, run: str = "r", base: str = "b"
    ) -> bytes:
        """Request a round and return the update."""
        ids = {"federation": "f", "run": run, "round": number, "base": base}
        fit = Fit(**ids, evaluate=False, plan=Plan(compress=how and Compression.parse(how)))
        await send_tensors(self.link, fit, WEIGHTS, Route(TOPOLOGY.work, ["w"]))
        delivery = await anext(self.updates)
        delivery.ack()
        return bytes(delivery.body)


def learnt(body: bytes) -> np.ndarray:
    message, payload = decode(body)
    assert isinstance(message, Update)
    return decompress(read_tensors(message.tensors, payload), message.encoding, WEIGHTS)["w"]


@contextlib.asynccontextmanager
async def at_work(
    broker: MemoryBroker | None = None, task: Steps | None = None
) -> AsyncIterator[tuple[Coordinator, asyncio.Queue[int]]]:
    """Run a worker; yield its coordinator and the list of rounds with confirmed answers."""
    coordinator = Coordinator(broker or MemoryBroker())
    await coordinator.connect()
    connected, sent = asyncio.Event(), asyncio.Queue[int]()

    def tell(event: RunEvent) -> None:
        if isinstance(event, Connected):
            connected.set()
        elif isinstance(event, Sent):
            sent.put_nowait(event.round)

    service = WorkerService(
        WorkerSettings("f", "w", "steps"), task or Steps(), transport=coordinator.broker,
        topology=TOPOLOGY, record=tell, bar=lambda *_: None,
    )  # fmt: skip
    running = asyncio.create_task(service.run())
    try:
        await connected.wait()
        yield coordinator, sent
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_a_round_left_goes_into_the_next_and_only_there():
    async with at_work() as (coordinator, sent):
        first = await coordinator.ask(1)
        assert await sent.get() == 1
        assert await coordinator.ask(1) == first  # asked again, answered with the same bytes
        assert await sent.get() == 1
        second = learnt(await coordinator.ask(2))
    largest = np.sort(np.abs(LEARNT))[::-1]
    assert np.abs(learnt(first)).max() == largest[0]
    # The largest were sent in round 1; of those carried over, many are larger now: twice as large.
    left = LEARNT - learnt(first)
    both = np.where(second == 0, 0, LEARNT + left)
    np.testing.assert_array_equal(second, both)
    assert np.count_nonzero((second != 0) & (learnt(first) == 0)) > COUNT // 20


async def test_what_a_round_left_is_known_when_its_update_is_confirmed_however_late():
    loop, confirmed = asyncio.get_running_loop(), asyncio.Event()

    class Confirming(MemoryBroker):
        """A link that confirms the first update only after the next training."""

        async def open(self):
            link = await super().open()
            publish = link.publish

            async def late(body, properties, **where):
                await publish(body, properties, **where)
                if properties.type == "update":
                    await confirmed.wait()

            link.publish = late
            return link

    class Confirmed(Steps):
        def train(self, weights, plan, progress):
            if trained:
                loop.call_soon_threadsafe(confirmed.set)
            trained.append(plan)
            return super().train(weights, plan, progress)

    trained = []
    async with at_work(Confirming(), Confirmed()) as (coordinator, _):
        first = learnt(await coordinator.ask(1))
        second = learnt(await coordinator.ask(2))
    np.testing.assert_array_equal(second, np.where(second == 0, 0, 2 * LEARNT - first))
    assert not np.array_equal(second, first)


async def test_another_run_and_a_plain_round_carry_nothing_over():
    async with at_work() as (coordinator, sent):
        first = await coordinator.ask(1)
        assert await sent.get() == 1
        other = await coordinator.ask(2, run="another")
        assert await sent.get() == 2
        np.testing.assert_array_equal(learnt(other), learnt(first))
        plain = await coordinator.ask(3, how=None, run="another")
        assert await sent.get() == 3
        np.testing.assert_array_equal(learnt(plain), LEARNT)
        after = await coordinator.ask(4, run="another")
        np.testing.assert_array_equal(learnt(after), learnt(first))


async def test_a_round_asked_for_again_after_a_later_one_takes_nothing_twice():
    async with at_work() as (coordinator, sent):
        first = await coordinator.ask(1)
        assert await sent.get() == 1
        await coordinator.ask(2)
        assert await sent.get() == 2
        # As a coordinator does that has lost its last checkpoint.
        again = await coordinator.ask(1)
        np.testing.assert_array_equal(learnt(again), learnt(first))


async def test_a_round_is_trained_again_where_it_begins_with_other_weights():
    async with at_work() as (coordinator, sent):
        first = await coordinator.ask(1, base="lost")
        assert await sent.get() == 1
        # As after a coordinator that died before its average was on disk.
        again = await coordinator.ask(1, base="found")
    assert [decode(body)[0].base for body in (first, again)] == ["lost", "found"]
    np.testing.assert_array_equal(learnt(again), learnt(first))
