"""The floor: the bytes of a federated round, sent with bare aio-pika.

A coordinator publishes a model once, transient, to the inboxes of all workers. Each worker sends as
many bytes back, and the coordinator acknowledges them. Nothing is encoded, decoded, summed or
written to a file. The broker gets the same work as from fluffle: the same classic (or quorum)
queues, publisher confirms, small bodies whole and durable, larger ones in parts with a few
unconfirmed at a time. Parts are transient, like fluffle's, unless ``durable_parts`` is set.

    python -m benchmarks.floor '{"url": …}' coordinator
    python -m benchmarks.floor '{"url": …}' 1

The coordinator reads numbers of rounds from its standard input, one per line, and answers each with
a line: the seconds of these rounds as a JSON list.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from fluffle_common.protocol.wire_format import PART_BYTES

_EXCHANGE = "floor.work"
_UPDATES = "floor.updates"
_PREFETCH = 64
_INBOX_PREFETCH = 8

Publish = Callable[[bytes], Awaitable[object]]


@dataclass(frozen=True)
class Spec:
    """What is sent.

    Args:
        url: the address of the broker.
        workers: the number of workers.
        size_bytes: the size of the model and of each answer.
        queue_type: ``classic`` or ``quorum``.
        part_bytes: the size of a part; larger bodies are sent in parts.
        window: the largest number of unconfirmed parts.
        durable_parts: whether the parts of answers are durable.
    """

    url: str
    workers: int
    size_bytes: int
    queue_type: str = "classic"
    part_bytes: int = PART_BYTES
    window: int = 4
    durable_parts: bool = False

    @property
    def parts(self) -> int:
        """The number of parts of the model and of each answer."""
        return -(-self.size_bytes // self.part_bytes)

    @property
    def answer_mode(self) -> aio_pika.DeliveryMode:
        """The delivery mode of an answer."""
        durable = self.parts == 1 or self.durable_parts
        return aio_pika.DeliveryMode.PERSISTENT if durable else aio_pika.DeliveryMode.NOT_PERSISTENT

    def bodies(self) -> list[bytes]:
        """Return random bodies of a model's size."""
        starts = range(0, self.size_bytes, self.part_bytes)
        return [os.urandom(min(self.part_bytes, self.size_bytes - start)) for start in starts]

    def json(self) -> str:
        """Return the spec as JSON for the command line."""
        return json.dumps(asdict(self))


async def publish_all(publish: Publish, bodies: Sequence[bytes], window: int) -> None:
    """Publish bodies in order, ``window`` at a time, and wait until all are confirmed."""
    if len(bodies) == 1:
        await publish(bodies[0])
        return
    window_slots = asyncio.Semaphore(window)

    async def publish_one(body: bytes) -> None:
        await publish(body)
        window_slots.release()

    async with asyncio.TaskGroup() as group:
        for body in bodies:
            await window_slots.acquire()
            group.create_task(publish_one(body))


async def work(spec: Spec, number: int) -> None:
    """Run a worker, which answers each model, until killed."""
    connection = await aio_pika.connect(spec.url)
    sending = await connection.channel(publisher_confirms=True)
    reading = await connection.channel(publisher_confirms=False)
    await reading.set_qos(prefetch_count=_INBOX_PREFETCH)
    arguments: dict[str, Any] = {"x-queue-type": spec.queue_type}
    await sending.declare_queue(_UPDATES, durable=True, arguments=arguments)
    exchange = await reading.declare_exchange(_EXCHANGE, "direct", durable=True)
    inbox = await reading.declare_queue(f"floor.inbox.{number}", durable=True, arguments=arguments)
    await inbox.bind(exchange, str(number))
    answers = sending.default_exchange

    async def publish(body: bytes) -> None:
        message = aio_pika.Message(body, delivery_mode=spec.answer_mode)
        await answers.publish(message, _UPDATES)

    received: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(message: AbstractIncomingMessage) -> None:
        await message.ack()
        received.put_nowait(message.body)

    await inbox.consume(take)
    print("ready", flush=True)
    while True:
        bodies = [await received.get() for _ in range(spec.parts)]
        await publish_all(publish, bodies, spec.window)


async def coordinate(spec: Spec) -> None:
    """Run the coordinator, which runs rounds on request, until killed."""
    connection = await aio_pika.connect(spec.url)
    sending = await connection.channel(publisher_confirms=True)
    reading = await connection.channel(publisher_confirms=False)
    await reading.set_qos(prefetch_count=_PREFETCH)
    arguments: dict[str, Any] = {"x-queue-type": spec.queue_type}
    updates = await reading.declare_queue(_UPDATES, durable=True, arguments=arguments)
    exchange = await sending.declare_exchange(_EXCHANGE, "direct", durable=True)
    first, *others = [str(number) for number in range(1, spec.workers + 1)]
    headers: dict[str, Any] = {"CC": others} if others else {}

    async def publish(body: bytes) -> None:
        transient = aio_pika.DeliveryMode.NOT_PERSISTENT
        message = aio_pika.Message(body, delivery_mode=transient, headers=headers)
        await exchange.publish(message, first)

    missing, complete = 0, asyncio.Event()

    async def take(message: AbstractIncomingMessage) -> None:
        nonlocal missing
        await message.ack()
        missing -= 1
        if not missing:
            complete.set()

    await updates.consume(take)
    model = spec.bodies()
    print("ready", flush=True)
    while rounds := await asyncio.to_thread(sys.stdin.readline):
        seconds = []
        for _ in range(int(rounds)):
            began = time.monotonic()
            missing = spec.workers * spec.parts
            complete.clear()
            await publish_all(publish, model, spec.window)
            await complete.wait()
            seconds.append(time.monotonic() - began)
        print(json.dumps(seconds), flush=True)


def main() -> None:
    """Run the role that the command line names."""
    spec, role = Spec(**json.loads(sys.argv[1])), sys.argv[2]
    asyncio.run(coordinate(spec) if role == "coordinator" else work(spec, int(role)))


if __name__ == "__main__":
    main()
