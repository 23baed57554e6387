"""Listing, requeuing, purging and counting rejected messages, on the in-memory broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from fluffle_broker.inspect.rejected import (
    destination,
    dropped,
    list_rejected,
    purge,
    read_rejected,
    requeue,
)
from fluffle_common.errors import MalformedMessage, UsageError
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import encode
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.messaging import reject
from fluffle_common.transport.rabbitmq.management import QueueFigures

TOPOLOGY = Topology("f")


@pytest.fixture
async def link() -> AsyncIterator[MemoryLink]:
    opened = await MemoryBroker().open()
    await opened.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w1")])
    yield opened
    await opened.close()


def body(number: int) -> bytes:
    ids = {"run": "r", "round": number, "base": "b", "worker": "w1"}
    return encode(Update(federation="f", num_examples=1, seconds=0, **ids))


async def another(link: MemoryLink) -> MemoryLink:
    """Open a link for a function that closes it."""
    return await link._broker.open()


async def refuse(link: MemoryLink, queue: str, message: bytes, **properties: object) -> None:
    """Reject a message as the coordinator or a worker does."""
    sent = Properties(**{"type": "update", "headers": {"worker": "w1"}, **properties})
    await link.publish(message, sent, exchange="", keys=[queue])
    wrong = MalformedMessage("the message belongs to run other", "run")
    await reject(link, await link.get(queue), wrong, TOPOLOGY.rejected)


async def refuse_updates(link: MemoryLink, count: int) -> None:
    for number in range(1, count + 1):
        await refuse(link, TOPOLOGY.updates, body(number), message_id=f"m{number}")


async def ready(link: MemoryLink, queue: str = TOPOLOGY.rejected) -> int:
    return (await link.counts(queue)).ready


async def test_listing_shows_the_reasons_and_keeps_the_messages(link):
    await refuse_updates(link, 3)
    await refuse(link, TOPOLOGY.updates, b"junk", type="", headers={})
    for _ in range(2):
        rejects = await list_rejected(await another(link), TOPOLOGY)
    assert [(m.number, m.cause, m.reason, m.queue) for m in rejects] == [
        (n, "run", "the message belongs to run other", "f.updates") for n in (1, 2, 3, 4)
    ]
    assert [(m.decoded.kind, m.decoded.worker) for m in rejects[2:]] == [
        ("update", "w1"),
        ("unknown", None),
    ]
    assert rejects[0].rejected_at.startswith("20")
    assert all(message.decoded.size_bytes for message in rejects)
    assert await ready(link) == 4


async def test_reading_one_keeps_the_messages(link):
    await refuse_updates(link, 3)
    assert (await read_rejected(await another(link), TOPOLOGY, 2)).decoded.round == 2
    assert await ready(link) == 3
    for number in (4, 50):
        with pytest.raises(UsageError, match=f"no message {number}.*1 to 3"):
            await read_rejected(await another(link), TOPOLOGY, number)
    assert await ready(link) == 3


async def test_requeue_restores_the_original_properties(link):
    await refuse_updates(link, 3)
    (done,) = await requeue(await another(link), TOPOLOGY, {2})
    assert (done.exchange, done.key, done.left) == ("f.results", "update.w1", None)
    again = await link.get(TOPOLOGY.updates)
    assert again.body == body(2)
    assert (again.properties.type, again.properties.message_id) == ("update", "m2")
    assert again.properties.headers == {"worker": "w1"}
    assert [m.decoded.round for m in await list_rejected(await another(link), TOPOLOGY)] == [1, 3]


async def test_requeue_all_sends_every_message(link):
    await refuse_updates(link, 3)
    assert [done.left for done in await requeue(await another(link), TOPOLOGY, None)] == [None] * 3
    assert (await ready(link), await ready(link, TOPOLOGY.updates)) == (0, 3)


@pytest.mark.parametrize("numbers", [{0}, {4}, {1, 9}])
async def test_an_unknown_number_sends_nothing(link, numbers):
    await refuse_updates(link, 3)
    with pytest.raises(UsageError, match="there is no message"):
        await requeue(await another(link), TOPOLOGY, numbers)
    assert (await ready(link), await ready(link, TOPOLOGY.updates)) == (3, 0)


async def test_a_message_without_a_destination_stays_with_the_reason(link):
    await refuse(link, TOPOLOGY.inbox("w1"), b"mail", type="fit")
    await link.publish(b"?", Properties(), exchange="", keys=[TOPOLOGY.rejected])
    link._broker.delete(TOPOLOGY.inbox("w1"))
    await refuse_updates(link, 1)
    gone, unknown, fine = await requeue(await another(link), TOPOLOGY, None)
    assert gone.left == "f.inbox.w1 no longer exists"
    assert unknown.left == "its origin is unknown"
    assert fine.left is None
    assert [m.number for m in await list_rejected(await another(link), TOPOLOGY)] == [1, 2]


@pytest.mark.parametrize(
    ("headers", "kind", "expected"),
    [
        ({"from": "f.updates", "worker": "w1"}, "update", ("f.results", "update.w1")),
        ({"from": "f.updates", "worker": "w1"}, "fit", ("", "f.updates")),
        ({"from": "f.updates"}, "", ("", "f.updates")),
        ({"from": "f.updates", "worker": "w" * 300}, "update", ("", "f.updates")),
        ({"from": "f.presence", "worker": "w1"}, "hello", ("f.results", "hello.w1")),
        ({"from": "f.inbox.w.1"}, "fit", ("f.work", "w.1")),
        ({"from": "f.outbox.w1"}, "part", ("f.results", "part.w1")),
        ({"from": "other.updates"}, "update", None),
        ({"x-first-death-queue": "f.updates"}, "", ("", "f.updates")),
        ({"x-first-death-queue": "f.updates", "from": "f.inbox.w1"}, "stop", ("", "f.updates")),
        ({"x-first-death-queue": "f.inbox.w1"}, "stop", None),
        ({"worker": "w1"}, "update", ("f.results", "update.w1")),
        ({"worker": "w1"}, "fit", None),
        ({"worker": "w" * 300}, "update", None),
        ({}, "update", None),
    ],
)
async def test_destination(link, headers, kind, expected):
    sent = Properties(type=kind, headers=headers)
    await link.publish(b"junk", sent, exchange="", keys=[TOPOLOGY.rejected])
    (message,) = await list_rejected(await another(link), TOPOLOGY)
    assert destination(message, TOPOLOGY) == expected


@pytest.mark.parametrize(
    ("headers", "expected"), [({}, ("f.work", "w1")), ({"x-first-death-queue": "f.inbox.w1"}, None)]
)
async def test_a_worker_cannot_have_mail_requeued_for_another(link, headers, expected):
    """Regression: a queue of its own that dead-letters to ``results`` can use any key."""
    sent = Properties(type="stop", headers={"from": "f.inbox.w1", **headers})
    await link.publish(b"junk", sent, exchange=TOPOLOGY.results, keys=["rejected.w1"])
    (message,) = await list_rejected(await another(link), TOPOLOGY)
    assert destination(message, TOPOLOGY) == expected


async def test_a_dead_lettered_message_has_rabbitmqs_reason(link):
    sent = Properties(headers={"x-first-death-reason": "maxlen"})
    await link.publish(b"junk", sent, exchange="", keys=[TOPOLOGY.rejected])
    (message,) = await list_rejected(await another(link), TOPOLOGY)
    assert (message.reason, message.cause) == ("RabbitMQ dropped the message (maxlen)", "unknown")


async def test_purge_deletes_all(link):
    await refuse_updates(link, 3)
    assert await purge(link, TOPOLOGY) == 3
    assert await purge(link, TOPOLOGY) == 0
    assert await ready(link) == 0


async def test_a_quorum_queue_can_be_emptied_but_not_read(link):
    quorum = Topology("q", "quorum")
    await link.declare(quorum.shared())
    sent = Properties(type="update", headers={"worker": "w1", "from": "q.updates"})
    await link.publish(b"x", sent, exchange="", keys=["q.rejected"])
    with pytest.raises(UsageError, match="not a classic queue"):
        await list_rejected(await another(link), Topology("q"))
    await link.publish(b"x", sent, exchange="", keys=["q.rejected"])
    with pytest.raises(UsageError, match="not a classic queue"):
        await requeue(await another(link), Topology("q"), {2})  # would return message 1
    requeued = await requeue(await another(link), Topology("q"), None)
    assert [done.left for done in requeued] == [None, None]


async def test_an_unknown_federation_is_an_error(link):
    with pytest.raises(UsageError, match="no process of federation g"):
        await list_rejected(await another(link), Topology("g"))


# --- dropped messages ----------------------------------------------------------------------------

FIGURES = QueueFigures(
    "f.rejected", "", ready=1000, unacknowledged=0, consumers=0, size_bytes=0,
    published=10_000, settled=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "kept_now", "expected"),
    [
        (FIGURES, 1000, 9000),
        (replace(FIGURES, settled=40, ready=960), 960, 9000),
        (replace(FIGURES, published=1000), 1000, 0),
        (FIGURES, 990, None),  # they are behind
        (replace(FIGURES, ready=0), 1000, None),
        (replace(FIGURES, published=3), 1000, None),  # the broker was started again
        (replace(FIGURES, published=None, settled=None), 1000, None),
        (None, 1000, None),
    ],
)
def test_dropped_messages_are_counted_or_unknown(figures, kept_now, expected):
    assert dropped(figures, kept_now) == expected


@pytest.mark.parametrize(("source", "stays"), [("f.inbox.w1", False), ("f.inbox.w2", True)])
async def test_a_workers_rejects_return_only_to_its_own_queues(source, stays):
    link = await MemoryBroker().open()
    for worker in ("w1", "w2"):
        await link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker(worker)])
    sent = Properties(headers={"reason": "no mail", "from": source})
    key = TOPOLOGY.rejecting("w1")
    await link.publish(b"x", sent, exchange=TOPOLOGY.results, keys=[key])
    (done,) = await requeue(await another(link), TOPOLOGY, None)
    assert (done.left is not None) == stays
    assert await ready(link, source) == (0 if stays else 1)
