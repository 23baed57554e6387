"""Following the traffic of a federation, on the in-memory broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from fluffle_broker.cli.tap import Enough, TapPrinter
from fluffle_broker.inspect import tap as tapping
from fluffle_broker.inspect.decode import DecodedMessage
from fluffle_broker.inspect.tap import Tap, Wanted, bindings, workers_of
from fluffle_common.protocol.messages import (
    Bye,
    Evaluation,
    Fit,
    Heartbeat,
    Hello,
    Plan,
    Stop,
    Update,
)
from fluffle_common.protocol.topology import UPDATE_KINDS, Topology
from fluffle_common.protocol.wire_format import PART_BYTES
from fluffle_common.transport.base import MAX_LISTED_KEYS, Properties, Unroutable
from fluffle_common.transport.memory import MemoryBroker, MemoryLink
from fluffle_common.transport.messaging import Route, send, send_tensors

TOPOLOGY = Topology("f")
UPDATES, PRESENCE = TOPOLOGY.updates, TOPOLOGY.presence


def keys(wanted: Wanted, *existing: str) -> set[tuple[str, str]]:
    bound = bindings(TOPOLOGY, wanted, "tap", existing)
    assert {binding.queue for binding in bound} <= {"tap"}
    return {(binding.exchange.removeprefix("f."), binding.key) for binding in bound}


EVERYTHING = (UPDATES, PRESENCE, "f.inbox.w1", "f.outbox.w1")


@pytest.mark.parametrize(
    ("wanted", "existing", "expected"),
    [
        (Wanted(), (), set()),
        (Wanted(), (UPDATES,), {("results", f"{kind}.#") for kind in UPDATE_KINDS}),
        (Wanted(), ("f.inbox.w.1",), {("work", "w.1")}),
        (Wanted(), ("f.outbox.w1",), set()),
        (Wanted(parts=True), ("f.outbox.w1",), {("results", "part.w1")}),
        (
            Wanted(frozenset({"update"})), EVERYTHING,
            {("results", "update.#"), ("results", "hello.#"), ("results", "heartbeat.#")},
        ),
        (Wanted(frozenset({"update"}), "w1"), EVERYTHING, {("results", "update.w1")}),
        (
            Wanted(frozenset({"fit"}), "w1"), (*EVERYTHING, "f.inbox.w2"),
            {("work", "w1")},
        ),
        (
            Wanted(frozenset({"update"}), "w1", parts=True), EVERYTHING,
            {("results", "update.w1"), ("results", "part.w1")},
        ),
    ],
)  # fmt: skip
def test_a_tap_is_bound_only_to_wanted_keys_of_existing_queues(wanted, existing, expected):
    assert keys(wanted, *existing) == expected


class Watched:
    """A running tap on an in-memory broker, and the messages that it showed."""

    def __init__(self, broker: MemoryBroker, link: MemoryLink) -> None:
        self.broker, self.link = broker, link
        self.shown: list[DecodedMessage] = []
        self._new = asyncio.Event()

    def take(self, decoded: DecodedMessage) -> None:
        self.shown.append(decoded)
        self._new.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self._new.clear()
                await self._new.wait()

    @contextlib.asynccontextmanager
    async def tap(self, wanted: Wanted, *workers: str) -> AsyncIterator[None]:
        ready = asyncio.Event()
        running = Tap(await self.broker.open(), TOPOLOGY, wanted, workers, self.take)
        task = asyncio.create_task(running.run(ready.set))
        try:
            await asyncio.wait_for(ready.wait(), 60)
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def watched() -> Watched:
    broker = MemoryBroker()
    link = await broker.open()
    await link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w1"), *TOPOLOGY.of_worker("w2")])
    return Watched(broker, link)


def presence(kind: type[Hello | Heartbeat], worker: str) -> Hello | Heartbeat:
    fields = {"session": "s", "num_examples": 1, "task": "t", "heartbeat_s": 1.0}
    return kind(federation="f", worker=worker, **fields)


def evaluation(worker: str) -> Evaluation:
    ids = {"federation": "f", "run": "r", "round": 1, "base": "b", "worker": worker}
    return Evaluation(**ids, num_examples=1, loss=0.5)


STOP = Stop(federation="f", run="r", round=3, reason="the end")


async def say(watched: Watched, message: Any) -> None:
    await send(watched.link, message, Route(TOPOLOGY.results, [f"{message.kind}.{message.worker}"]))


async def test_both_directions_are_shown_and_no_message_is_lost(watched):
    async with watched.tap(Wanted(), "w1", "w2"):
        await send(watched.link, STOP, Route(TOPOLOGY.work, ["w1", "w2"]))
        await say(watched, evaluation("w2"))
        await watched.until(lambda: len(watched.shown) == 2)
    assert [(r.kind, workers_of(r)) for r in watched.shown] == [
        ("stop", ("w1", "w2")),
        ("evaluation", ("w2",)),
    ]
    for queue in ("f.inbox.w1", "f.inbox.w2", UPDATES):
        assert (await watched.link.counts(queue)).ready == 1


async def test_work_for_many_is_shown_for_one_of_them(watched):
    everyone = [f"w{number}" for number in range(1, MAX_LISTED_KEYS + 2)]
    for worker in everyone:
        await watched.link.declare(TOPOLOGY.of_worker(worker))
    async with watched.tap(Wanted(worker="w5"), "w5"):
        await send(watched.link, STOP, Route(TOPOLOGY.work, everyone))
        await watched.until(lambda: len(watched.shown) == 1)
    (shown,) = watched.shown
    assert workers_of(shown) == ("w1",)
    assert shown.delivery.properties.headers["recipients"] == len(everyone)


async def test_a_new_worker_is_followed_once_it_is_noticed(watched):
    async with watched.tap(Wanted()):
        await send(watched.link, STOP, Route(TOPOLOGY.work, ["w1"]))
        await say(watched, presence(Heartbeat, "w1"))
        async with asyncio.timeout(60):
            while not watched.shown:  # until the tap is bound
                await send(watched.link, STOP, Route(TOPOLOGY.work, ["w1"]))
                await asyncio.sleep(0)
        assert (await watched.link.counts("f.inbox.w1")).ready > len(watched.shown)
    assert {(r.kind, workers_of(r)) for r in watched.shown} == {("stop", ("w1",))}


async def test_only_wanted_messages_are_shown(watched):
    async with watched.tap(Wanted(frozenset({"bye", "heartbeat"}), "w1")):
        for worker in ("w2", "w1"):
            await say(watched, evaluation(worker))
            await say(watched, presence(Hello, worker))
            await say(watched, presence(Heartbeat, worker))
            await say(watched, Bye(federation="f", worker=worker, session="s", reason="done"))
        await watched.until(lambda: len(watched.shown) == 2)
    assert [(r.kind, r.worker) for r in watched.shown] == [("heartbeat", "w1"), ("bye", "w1")]


async def test_a_tap_does_not_hide_unroutable_messages(watched, monkeypatch):
    monkeypatch.setattr(tapping, "LOOK_AGAIN_S", 0.0)
    async with watched.tap(Wanted(parts=True), "w1", "w9"):
        with pytest.raises(Unroutable):
            await watched.link.publish(b"x", Properties(), exchange=TOPOLOGY.work, keys=["w9"])
        for key in ("part.w9", "odd.w1"):
            await watched.link.publish(b"x", Properties(), exchange=TOPOLOGY.results, keys=[key])
        assert (await watched.link.counts(TOPOLOGY.unrouted)).ready == 2
        watched.broker.delete(TOPOLOGY.inbox("w1"))  # as it expires

        async def gone() -> None:
            while True:
                await watched.link.publish(b"x", Properties(), exchange=TOPOLOGY.work, keys=["w1"])
                await asyncio.sleep(0)

        with pytest.raises(Unroutable):
            await asyncio.wait_for(gone(), 60)


async def test_a_federation_that_starts_later_is_followed(monkeypatch):
    monkeypatch.setattr(tapping, "LOOK_SOON_S", 0.0)
    broker = MemoryBroker()
    watched = Watched(broker, await broker.open())
    async with watched.tap(Wanted()):
        await watched.link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w1")])
        async with asyncio.timeout(60):
            while not watched.shown:
                await say(watched, presence(Hello, "w1"))
                await asyncio.sleep(0)
    assert watched.shown[0].kind == "hello"


async def test_an_exchange_that_is_deleted_and_declared_again_is_followed(watched, monkeypatch):
    monkeypatch.setattr(tapping, "LOOK_AGAIN_S", 0.0)
    async with watched.tap(Wanted(), "w1"):
        watched.broker.delete_exchange(TOPOLOGY.results)
        await watched.link.declare(TOPOLOGY.shared())
        async with asyncio.timeout(60):
            while not watched.shown:
                await say(watched, presence(Hello, "w1"))
                await asyncio.sleep(0)


async def test_a_worker_without_a_coordinator_does_not_end_the_tap(monkeypatch):
    monkeypatch.setattr(tapping, "LOOK_SOON_S", 0.0)
    broker = MemoryBroker()
    watched = Watched(broker, await broker.open())
    await watched.link.declare(TOPOLOGY.queues_of("w1"))
    async with watched.tap(Wanted(), "w1"):
        await watched.link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w1")])
        async with asyncio.timeout(60):
            while not watched.shown:
                await say(watched, presence(Hello, "w1"))
                await asyncio.sleep(0)


async def test_a_tap_leaves_nothing_behind(watched):
    before = (set(watched.broker.queues), set(watched.broker.bindings))
    async with watched.tap(Wanted(), "w1"):
        assert len(watched.broker.queues) == len(before[0]) + 1
    assert (set(watched.broker.queues), set(watched.broker.bindings)) == before


# --- lines ---------------------------------------------------------------------------------------


async def large(watched: Watched) -> None:
    """Send the work of a round, in two parts."""
    fit = Fit(federation="f", run="r", round=2, base="b", evaluate=True, plan=Plan())
    weights = {"kernel": np.zeros(PART_BYTES // 4 + 1, np.float32)}
    await send_tensors(watched.link, fit, weights, Route(TOPOLOGY.work, ["w1", "w2"]))


async def lines(watched: Watched, wanted: Wanted, *sending: Awaitable[None], **more: Any) -> list:
    printed: list[str] = []
    printer = TapPrinter(wanted, clock=lambda: 0.0, print_line=printed.append, **more)
    expected = len(sending)
    async with watched.tap(wanted, "w1", "w2"):
        for each in sending:
            await each
        await say(watched, evaluation("w1"))
        await watched.until(lambda: watched.shown and watched.shown[-1].kind == "evaluation")
    with contextlib.suppress(Enough):
        for decoded in watched.shown:
            printer.show(decoded)
    assert len(printed) >= min(expected, 1)
    return printed


async def test_parts_are_announced_and_not_listed(watched):
    printed = await lines(watched, Wanted(), large(watched))
    assert len(printed) == 2
    assert "→ w1,w2" in printed[0]
    assert "round 2, its tensors are sent separately, in 2 parts, 4.2 MB" in printed[0]
    assert "← w1" in printed[1]
    assert "round 1, 1 example, loss 0.5" in printed[1]


async def test_parts_are_listed_on_request(watched):
    wanted = Wanted(frozenset({"part", "evaluation"}), parts=True)
    printed = await lines(watched, wanted, large(watched))
    assert [line.split("  ")[-2].strip().split()[-4:] for line in printed[:2]] == [
        ["part", "1", "of", "2"],
        ["part", "2", "of", "2"],
    ]


async def test_many_names_keep_the_columns(watched):
    many = "client-1,client-2,client-3"
    printed: list[str] = []
    printer = TapPrinter(Wanted(), clock=lambda: 0.0, print_line=printed.append)
    async with watched.tap(Wanted(), "w1"):
        for worker in ("w1", "x" * len(many), "w1"):
            await say(watched, evaluation(worker))
        await watched.until(lambda: len(watched.shown) == 3)
    for decoded in watched.shown:
        printer.show(decoded)
    assert printed[1].index("evaluation") == printed[2].index("evaluation")
    assert printed[0].index("evaluation") < printed[1].index("evaluation")


async def test_an_update_in_a_line(watched):
    message = Update(
        federation="f", run="r", round=7, base="b", worker="w1", num_examples=120, seconds=1,
        metrics={"loss": 0.3, "accuracy": 0.91},
    )  # fmt: skip
    route = Route(TOPOLOGY.results, ["update.w1"])
    sending = send_tensors(watched.link, message, {"x": np.zeros(3)}, route)
    printed = await lines(watched, Wanted(), sending)
    assert (
        "← w1           update        round 7, 120 examples, loss 0.3, accuracy 0.91" in printed[0]
    )


async def test_lines_of_json(watched):
    (printed,) = await lines(watched, Wanted(frozenset({"evaluation"})), as_json=True)
    fields = json.loads(printed)
    assert (fields["direction"], fields["workers"], fields["loss"]) == ("from", ["w1"], 0.5)
    assert fields["time"] == "1970-01-01T00:00:00.000+00:00"


async def test_printing_stops_after_the_given_number_of_lines(watched):
    printed = await lines(watched, Wanted(), large(watched), most=1)
    assert len(printed) == 1
