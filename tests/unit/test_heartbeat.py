"""Hello, heartbeat, failure and bye."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from fluffle_common.errors import BrokerError, TaskError
from fluffle_common.protocol.messages import Fit, Heartbeat, Hello, Plan
from fluffle_common.protocol.topology import Binding, Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.base import Blocking, Properties
from fluffle_common.transport.memory import MemoryBroker
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.heartbeat import Presence
from fluffle_worker.machine import Work
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.signature import UNKNOWN
from fluffle_worker.task import EvalResult, TrainResult

TOPOLOGY = Topology("f")
FIT = Fit(federation="f", run="r", round=3, base="b7", evaluate=False, plan=Plan())


class Nothing:
    """A task with a number of examples and nothing else."""

    num_examples = 5

    def init(self, seed):
        return {}

    def train(self, weights, plan, progress):
        return TrainResult({}, self.num_examples)

    def evaluate(self, weights):
        return EvalResult(0.0, 1)


def presence_of(task: Any, name: str = "t", **settings: Any) -> Presence:
    settings = WorkerSettings("f", "w", name, **settings)
    return Presence(settings, task, TOPOLOGY, UNKNOWN, FrozenTensors(task))


async def sent_messages(presence: Presence, count: int) -> list[Hello | Heartbeat]:
    """Request heartbeats, one at a time."""
    link = await MemoryBroker().open()
    await link.declare(TOPOLOGY.shared())
    spoken = await link.consume(TOPOLOGY.presence, prefetch=count)
    speaking = asyncio.ensure_future(presence.signs_of_life(link))
    try:
        return [decode((await anext(spoken)).body)[0] for _ in range(count)]
    finally:
        speaking.cancel()
        await link.close()


@pytest.mark.parametrize("work", [FIT, Work("fit", "r", 3, "b7")], ids=["message", "work"])
async def test_it_says_what_it_is_at_and_which_weights_that_began_with(work):
    presence = presence_of(Nothing(), heartbeat_s=0.01)
    (hello,) = await sent_messages(presence, 1)
    assert (hello.kind, hello.run, hello.round, hello.base) == ("hello", None, 0, None)
    assert hello.model is None  # that of a task whose init fails is unknown
    presence.now("training", work, steps=9)
    for beat in await sent_messages(presence, 2):
        assert (beat.run, beat.round, beat.base, beat.steps) == ("r", 3, "b7", 9)


async def test_it_names_no_weights_where_it_was_asked_for_the_first():
    presence = presence_of(Nothing())
    presence.now("idle", Work("init", "r", 0))
    (hello,) = await sent_messages(presence, 1)
    assert (hello.run, hello.round, hello.base) == ("r", 0, None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"classes": ("c" * 90,) * 1000}, "'classes' is .*90000 bytes"),
        ({"classes": ("a", "c" * 101)}, r"'classes.1' is .*at most 100 characters"),
        ({"classes": ("a", "")}, r"'classes.1' is .*at least 1 character"),
        ({"num_examples": 10**13}, "'num_examples' is .*less than or equal to 1000000000000"),
        ({"num_examples": 10**5000}, "'num_examples' is .*"),
    ],
)
def test_a_task_with_more_to_say_of_itself_than_may_be_sent_is_an_error_of_the_task(fields, named):
    task = Nothing()
    vars(task).update(fields)
    with pytest.raises(TaskError, match=f"'t' cannot be sent, because the field {named}"):
        presence_of(task)


async def test_of_a_long_task_name_the_end_is_said():
    presence = presence_of(Nothing(), name="/long" * 50 + "/task.py:task")
    (hello,) = await sent_messages(presence, 1)
    assert len(hello.task) == 200
    assert hello.task.endswith("/task.py:task")


async def test_it_says_how_much_of_its_answer_has_arrived():
    presence = presence_of(Nothing())
    presence.now("training", FIT, steps=9)
    presence.sent(1, 4)  # of the answer before
    (beat,) = await sent_messages(presence, 1)
    assert (beat.state, beat.step, beat.steps) == ("training", 0, 9)
    presence.now("sending", FIT)
    presence.sent(3, 4)
    (beat,) = await sent_messages(presence, 1)
    assert (beat.state, beat.step, beat.steps) == ("sending", 3, 4)


class Slow:
    """A link that never confirms a heartbeat."""

    def __init__(self) -> None:
        self.blocking, self.incomplete_bytes = Blocking(), 0
        self.published: list[tuple[str, bool]] = []
        self.enough = asyncio.Event()
        self.bodies: list[bytes] = []

    async def publish(self, body: bytes, properties: Properties, *, urgent: bool, **_: object):
        self.bodies.append(body)
        self.published.append((properties.type, urgent))
        if len(self.published) == 4:
            self.enough.set()
        if properties.type == "heartbeat":
            await asyncio.Event().wait()


async def test_signs_of_life_are_urgent_and_do_not_wait_for_each_others_confirmation():
    presence = presence_of(Nothing(), heartbeat_s=0.01)
    link = Slow()
    speaking = asyncio.ensure_future(presence.signs_of_life(link))
    async with asyncio.timeout(60):
        await link.enough.wait()
    link.blocking.set("low on memory")  # one is under way, and more would only be old
    count = len(link.published)
    await asyncio.sleep(0.05)
    speaking.cancel()
    assert len(link.published) == count
    assert link.published[:3] == [("hello", True), ("heartbeat", True), ("heartbeat", True)]
    for telling in presence._being_sent:
        telling.cancel()


async def test_a_heartbeat_says_how_much_of_incomplete_messages_has_arrived():
    presence, link = presence_of(Nothing(), heartbeat_s=0.01), Slow()
    link.incomplete_bytes = 700_000
    speaking = asyncio.ensure_future(presence.signs_of_life(link))
    async with asyncio.timeout(60):
        await link.enough.wait()
    speaking.cancel()
    for telling in presence._being_sent:
        telling.cancel()
    beat, _ = decode(link.bodies[1])
    assert (beat.kind, beat.state, beat.incomplete_bytes) == ("heartbeat", "idle", 700_000)


class Forbidden:
    """A link whose user may not publish."""

    async def publish(self, *_: object, **__: object) -> None:
        raise BrokerError("access to topic 'failure.w' refused")


async def test_a_refused_message_in_the_background_leaves_no_unhandled_exception():
    presence, unhandled = presence_of(Nothing()), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    presence.failed(Forbidden(), Work("fit", "r", 3, "b7"), "no data")
    while presence._being_sent:  # noqa: ASYNC110
        await asyncio.sleep(0)
    gc.collect()
    assert unhandled == []


async def test_a_hello_that_no_queue_is_bound_for_is_said_again(monkeypatch):
    monkeypatch.setattr("fluffle_worker.heartbeat._HELLO_AGAIN_S", 0.001)
    presence = presence_of(Nothing())
    link = await MemoryBroker().open()
    shared = TOPOLOGY.shared()
    await link.declare([one for one in shared if not isinstance(one, Binding)])
    speaking = asyncio.ensure_future(presence.signs_of_life(link))
    await asyncio.sleep(0.01)
    assert (await link.counts(TOPOLOGY.unrouted)).ready == 0
    await link.declare(shared)
    spoken = await link.consume(TOPOLOGY.presence, prefetch=1)
    assert decode((await anext(spoken)).body)[0].kind == "hello"
    speaking.cancel()
    await link.close()


async def test_a_request_to_speak_up_that_overtakes_the_confirmation_of_the_hello_is_kept():
    presence, beaten = presence_of(Nothing(), heartbeat_s=60.0), asyncio.Event()

    class Late(Slow):
        """A link that confirms the hello after the coordinator's answer has arrived."""

        async def publish(self, body: bytes, properties: Properties, **_: Any) -> None:
            if properties.type == "hello":
                presence.speak_up()
            else:
                beaten.set()

    speaking = asyncio.ensure_future(presence.signs_of_life(Late()))
    async with asyncio.timeout(20):
        await beaten.wait()
    speaking.cancel()
