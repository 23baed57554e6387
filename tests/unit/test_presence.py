"""What a worker says of itself while it works."""

from __future__ import annotations

import asyncio

import pytest

from fluffle_common.memory import MemoryBroker
from fluffle_common.messages import Fit, Heartbeat, Hello, Plan
from fluffle_common.topology import Topology
from fluffle_common.wire import decode
from fluffle_worker.presence import Presence
from fluffle_worker.service import WorkerSettings
from fluffle_worker.session import Work
from fluffle_worker.task import EvalResult, TrainResult

TOPOLOGY = Topology("f")
FIT = Fit(federation="f", run="r", round=3, base="b7", evaluate=False, plan=Plan())


class Nothing:
    """A task of which only the number of examples matters."""

    num_examples = 5

    def init(self, seed):
        return {}

    def train(self, weights, plan, progress):
        return TrainResult({}, self.num_examples)

    def evaluate(self, weights):
        return EvalResult(0.0, 1)


async def said(presence: Presence, count: int) -> list[Hello | Heartbeat]:
    """Let it speak up so many times."""
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
    presence = Presence(WorkerSettings("f", "w", "t", heartbeat_s=0.01), Nothing(), TOPOLOGY)
    (hello,) = await said(presence, 1)
    assert (hello.kind, hello.run, hello.round, hello.base) == ("hello", None, 0, None)
    presence.now("training", work, steps=9)
    for sign in await said(presence, 2):
        assert (sign.run, sign.round, sign.base, sign.steps) == ("r", 3, "b7", 9)


async def test_it_names_no_weights_where_it_was_asked_for_the_first():
    presence = Presence(WorkerSettings("f", "w", "t"), Nothing(), TOPOLOGY)
    presence.now("idle", Work("init", "r", 0))
    (hello,) = await said(presence, 1)
    assert (hello.run, hello.round, hello.base) == ("r", 0, None)
