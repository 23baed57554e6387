"""A worker on the in-memory broker whose task misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from fluffle_common.errors import RunError, TaskError
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.messages import (
    Failure,
    Fit,
    Heartbeat,
    Hello,
    Plan,
    Stop,
    Update,
    Welcome,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import decode
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.messaging import Route, send, send_tensors
from fluffle_worker.service import WorkerService
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.task import TrainResult
from fluffle_worker.trainer import TrainingThread

PATIENCE_S = 60.0
TOPOLOGY = Topology("f")
WEIGHTS = {"w": np.zeros(4, np.float32)}


class Raising:
    """A task that runs given functions instead of training."""

    num_examples = np.int64(5)

    def __init__(self, *instead: Callable[[Any], object] | None) -> None:
        self._instead = list(instead)

    def init(self, seed):
        return WEIGHTS

    def train(self, weights, plan, progress):
        instead = self._instead.pop(0) if self._instead else None
        if instead is not None:
            instead(progress)
        return TrainResult({"w": weights["w"] + 1}, 5)

    def evaluate(self, weights):
        return None


class Federation:
    """A worker and a minimal coordinator."""

    def __init__(self, task: Any, **settings: Any) -> None:
        self.broker, self.events, self._news = MemoryBroker(), [], asyncio.Event()
        self.service = WorkerService(
            WorkerSettings("f", "w", "raising", heartbeat_s=0.01, **settings), task,
            transport=self.broker, topology=TOPOLOGY,
            record=self._tell, bar=lambda *_: None,
        )  # fmt: skip

    async def connect(self) -> None:
        self.link = await self.broker.open()
        await self.link.declare([*TOPOLOGY.shared(), *TOPOLOGY.of_worker("w")])
        self.updates = await self.link.consume(TOPOLOGY.updates, prefetch=1)
        self.signs = await self.link.consume(TOPOLOGY.presence, prefetch=1)
        self.running = asyncio.ensure_future(self.service.run())
        assert isinstance(await self.sign(Hello), Hello)

    def _tell(self, event: RunEvent) -> None:
        assert event.sentence()
        self.events.append((event.name, event.fields()))
        self._news.set()

    async def hear(self, what: str) -> None:
        """Wait until the worker records this event."""
        async with asyncio.timeout(PATIENCE_S):
            while what not in [name for name, _ in self.events]:
                self._news.clear()
                await self._news.wait()

    async def say(self, message: Any) -> None:
        await send(self.link, message, Route(TOPOLOGY.work, ["w"]))

    async def ask(self, number: int) -> None:
        fit = Fit(federation="f", run="r", round=number, base="b", evaluate=False, plan=Plan())
        await send_tensors(self.link, fit, WEIGHTS, Route(TOPOLOGY.work, ["w"]))

    async def sign(self, kind: Any, **fields: Any) -> Any:
        """Return the next presence message of this kind with these fields."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                delivery = await anext(self.signs)
                delivery.ack()
                message, _ = decode(delivery.body)
                if isinstance(message, kind) and all(
                    getattr(message, name) == value for name, value in fields.items()
                ):
                    return message

    async def update(self) -> Update:
        async with asyncio.timeout(PATIENCE_S):
            delivery = await anext(self.updates)
        delivery.ack()
        message, _ = decode(delivery.body)
        assert isinstance(message, Update)
        return message

    async def stop(self, outcome: Any) -> None:
        await self.say(Stop(federation="f", run="r", round=1, reason="so it is", outcome=outcome))
        async with asyncio.timeout(PATIENCE_S):
            assert await self.running == "so it is"


@contextlib.asynccontextmanager
async def federation(task: Any, **settings: Any) -> AsyncIterator[Federation]:
    made = Federation(task, **settings)
    await made.connect()
    try:
        yield made
    finally:
        made.running.cancel()
        await asyncio.gather(made.running, return_exceptions=True)


def exits(_: Any) -> None:
    sys.exit(3)


def interrupts(_: Any) -> None:
    raise KeyboardInterrupt


def ends(_: Any) -> None:
    raise GeneratorExit


def ends_untold(_: Any) -> None:
    class Untold(Exception):
        def __str__(self) -> str:
            raise SystemExit(3)

    raise Untold


def ends_unreadable(_: Any) -> None:
    class Unreadable(Exception):
        def __getattribute__(self, name: str) -> Any:
            raise MemoryError

    raise Unreadable


@pytest.mark.parametrize("end", [exits, interrupts, ends, ends_untold, ends_unreadable])
async def test_whatever_a_task_raises_is_a_failure_and_the_worker_goes_on(end):
    async with federation(Raising(end, None)) as made:
        await made.ask(1)
        failure = await made.sign(Failure)
        assert (failure.run, failure.round) == ("r", 1)
        place = "(test_worker_faults.py:"
        assert place in failure.reason or failure.reason == "Unreadable"
        await made.ask(2)
        assert (await made.update()).round == 2
        await made.stop("finished")
        assert made.service.verdict() is None


async def test_a_traceback_is_told_once_and_a_failure_every_time():
    async with federation(Raising(exits, exits)) as made:
        for number in (1, 2):
            await made.ask(number)
            await made.sign(Failure, round=number)
        assert [what for what, _ in made.events].count("failure") == 2
        (trace,) = [fields["text"] for what, fields in made.events if what == "traceback"]
        assert trace.startswith("Traceback")
        assert "sys.exit(3)" in trace
        assert "fluffle_worker" not in trace


async def test_a_loss_that_is_no_number_ends_no_heartbeat():
    def step(progress: Any) -> None:
        progress(np.int64(1), np.int64(3), float("nan"))

    async with federation(Raising(step)) as made:
        await made.ask(1)
        assert (await made.update()).round == 1
        await made.sign(Heartbeat, round=1)
        assert not made.running.done()


async def test_what_a_task_makes_of_being_told_to_stop_is_no_failure():
    going, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def wraps(progress: Any) -> None:
        loop.call_soon_threadsafe(going.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE_S)
        try:
            progress(1, 2, None)
        except Exception:
            raise RuntimeError("interrupted") from None

    async with federation(Raising(wraps)) as made:
        await made.ask(1)
        await going.wait()
        await made.ask(2)
        await made.hear("abandoned")
        go_on.set()
        assert (await made.update()).round == 2
        assert "failure" not in [what for what, _ in made.events]


@pytest.mark.parametrize(
    ("instead", "outcome", "verdict", "code", "named"),
    [
        ([None], "finished", None, 0, ""),
        ([None], "stopped", RunError, 4, "the run stopped before its end (so it is)"),
        ([exits], "finished", TaskError, 5, "failed in every round: SystemEx"),
        ([exits], "stopped", TaskError, 5, "failed in every round"),
    ],
)
async def test_how_a_run_went_is_what_the_process_ends_with(instead, outcome, verdict, code, named):
    async with federation(Raising(*instead)) as made:
        await made.say(Welcome(federation="f", run="r", round=1, rounds=1))
        await made.ask(1)
        await (made.sign(Failure) if instead[0] else made.update())
        await made.stop(outcome)
        found = made.service.verdict()
        assert (type(found) if found else None) is verdict
        assert named in str(found)
        assert getattr(found, "exit_code", 0) == code


async def test_a_task_that_is_at_something_when_the_run_ends_is_known_to_be():
    going, loop = asyncio.Event(), asyncio.get_running_loop()
    go_on = asyncio.Event()

    def hangs(_: Any) -> None:
        loop.call_soon_threadsafe(going.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE_S)

    async with federation(Raising(hangs)) as made:
        assert not made.service.at_work
        await made.ask(1)
        await going.wait()
        await made.stop("finished")
        assert made.service.at_work
        go_on.set()


async def test_the_first_sign_of_life_says_what_the_model_is_made_of():
    made = Federation(Raising())
    made.link = await made.broker.open()
    await made.link.declare(TOPOLOGY.shared())
    made.signs = await made.link.consume(TOPOLOGY.presence, prefetch=1)
    running = asyncio.ensure_future(made.service.run())
    hello = await made.sign(Hello)
    assert hello.model is not None
    assert hello.model.summary == "1 tensor, 4 parameters: float32 1"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_model_of_another_form_is_a_failure_that_says_in_what():
    class Other(Raising):
        def init(self, seed):
            return {"w": np.zeros(5, np.float32)}

    async with federation(Other()) as made:
        await made.ask(1)
        assert (await made.sign(Failure)).reason == (
            "the federation's model differs from this task's model: tensor 'w' is float32 of shape "
            "(4,) in the federation, but float32 of shape (5,) in this task"
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of JAX, where other tests have it
async def test_a_child_that_a_task_forks_does_not_come_back_as_a_worker():
    child: list[int] = []

    def forks(_: Any) -> None:
        pid = os.fork()
        if not pid:
            raise SystemExit  # as one that is done does
        child.append(pid)

    async with federation(Raising(forks)) as made:
        await made.ask(1)
        assert (await made.update()).round == 1
        async with asyncio.timeout(PATIENCE_S):
            _, status = await asyncio.to_thread(os.waitpid, child[0], 0)
        assert os.waitstatus_to_exitcode(status) == 1
        assert "failure" not in [what for what, _ in made.events]


async def test_where_the_task_runs_may_be_chosen():
    class Noted(TrainingThread):
        put_here = 0

        def put(self, work):
            Noted.put_here += 1
            super().put(work)

    made = Federation(Raising())
    made.service = WorkerService(
        WorkerSettings("f", "w", "raising"), Raising(), transport=made.broker, topology=TOPOLOGY,
        record=lambda *_: None, bar=lambda *_: None, enqueue=Noted().put,
    )  # fmt: skip
    await made.connect()
    await made.ask(1)
    assert (await made.update()).round == 1
    made.running.cancel()
    await asyncio.gather(made.running, return_exceptions=True)
    assert Noted.put_here == 1
