"""The uploader: order, retries and confirmations of a worker's answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.protocol.messages import Evaluation, Fit, Plan, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import PART_BYTES
from fluffle_common.transport.base import Properties, QueueFull
from fluffle_worker import uploader as answers
from fluffle_worker.error_feedback import Residual
from fluffle_worker.job import Job
from fluffle_worker.machine import Work
from fluffle_worker.uploader import Uploader

IDS: dict[str, Any] = {"federation": "f", "run": "r", "base": "b"}
PATIENCE_S = 60.0


class Slow:
    """A link that records what is published and confirms it on request."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self._confirms: dict[str, asyncio.Future[None]] = {}
        self._news = asyncio.Event()

    def confirmation(self, what: str) -> asyncio.Future[None]:
        return self._confirms.setdefault(what, asyncio.get_running_loop().create_future())

    async def publish(self, body: bytes, properties: Properties, **_: Any) -> None:
        headers = properties.headers
        what = f"{properties.type} {headers.get('round', headers.get('part'))}"
        self.published.append(what)
        self._news.set()
        await self.confirmation(what)

    async def until(self, *published: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.published != list(published):
                self._news.clear()
                await self._news.wait()


class Worker:
    """The uploader's surroundings: its connection, wanted jobs, confirmed jobs and events."""

    def __init__(self) -> None:
        self.slow = Slow()
        self.unwanted: set[int] = set()
        self.confirmed: list[int] = []
        self.events: list[str] = []
        self.parts: list[tuple[int, int]] = []
        self.training: set[int] = set()
        self.answers = Uploader(
            Topology("f"),
            "w",
            self,  # type: ignore[arg-type]
            wanted=lambda job: job.work.round not in self.unwanted,
            due=lambda job: job.work.round not in self.training,
            confirmed=lambda job: self.confirmed.append(job.work.round),
            record=lambda event: self.events.append(event.name),
            sent=lambda done, parts: self.parts.append((done, parts)),
        )

    async def link(self) -> Any:
        return self.slow

    async def ready_outbox(self, link: Any) -> None:
        assert link is self.slow


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    made = Worker()
    running = asyncio.create_task(made.answers.run())
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def job(number: int, size: int = 3) -> Job:
    made = Job(Fit(**IDS, round=number, evaluate=True, plan=Plan()))
    update = Update(**IDS, worker="w", round=number, num_examples=1, seconds=0.0, metrics={})
    made.answer = update, {"w": np.zeros(size, np.float32)}
    made.residual = Residual(made.work)
    return made


async def test_an_answer_does_not_wait_until_the_one_before_is_confirmed(worker):
    worker.answers.put(job(1))
    await worker.slow.until("update 1")
    worker.unwanted.add(1)  # there is newer work: so its round was averaged
    worker.answers.put(job(2))
    await worker.slow.until("update 1", "update 2")
    worker.slow.confirmation("update 2").set_result(None)
    worker.slow.confirmation("update 1").set_result(None)
    await asyncio.to_thread(worker.answers.residual)
    assert sorted(worker.confirmed) == [1, 2]


async def test_nothing_is_sent_after_the_end():
    worker = Worker()
    running = asyncio.create_task(worker.answers.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    worker.answers.put(job(1))
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_error_of_one_answer_ends_the_others():
    worker = Worker()
    running = asyncio.create_task(worker.answers.run())
    for number in (1, 2):
        worker.answers.put(job(number))
    await worker.slow.until("update 1", "update 2")
    worker.slow.confirmation("update 1").set_exception(BrokerError("no right to write"))
    with pytest.raises(BrokerError, match="no right to write"):
        await running
    assert worker.slow.confirmation("update 2").cancelled()


async def test_what_an_update_left_is_told_when_nothing_is_under_way(worker):
    for number in (1, 2):
        worker.answers.put(job(number))
    await worker.slow.until("update 1", "update 2")
    asked = asyncio.ensure_future(asyncio.to_thread(worker.answers.residual))
    worker.slow.confirmation("update 1").set_result(None)
    await asyncio.wait({asked}, timeout=0.05)
    assert not asked.done()
    worker.slow.confirmation("update 2").set_result(None)
    assert (await asked).work == Work("fit", "r", 2, "b", sequence=2)


async def test_an_evaluation_comes_before_its_update_and_once(worker):
    both = job(2)
    both.evaluation = Evaluation(**IDS, worker="w", round=1, num_examples=1, loss=0.5, metrics={})
    worker.training.add(2)
    worker.answers.put(both)
    await worker.slow.until("evaluation 1")
    worker.training.clear()
    worker.answers.put(both)
    worker.slow.confirmation("evaluation 1").set_result(None)
    await worker.slow.until("evaluation 1", "update 2")
    assert worker.confirmed == []
    worker.slow.confirmation("update 2").set_result(None)
    await asyncio.to_thread(worker.answers.residual)
    assert worker.confirmed == [2]


async def test_only_one_answer_in_parts_is_under_way(worker):
    large = PART_BYTES // 4 + 1
    worker.answers.put(job(1, large))
    worker.answers.put(job(2, large))
    worker.answers.put(job(3))
    await worker.slow.until("update 3", "part 0", "part 1")
    for what in ("part 0", "part 1", "update 1"):  # from here on, parts are confirmed at once
        worker.slow.confirmation(what).set_result(None)
    await worker.slow.until(
        "update 3", "part 0", "part 1", "update 1", "part 0", "part 1", "update 2"
    )
    assert worker.confirmed == [1]  # the others are not confirmed


async def test_parts_that_have_arrived_are_told_and_no_more_are_sent_of_what_nobody_wants(worker):
    worker.answers.put(job(1, 6 * PART_BYTES // 4))
    await worker.slow.until(*(f"part {number}" for number in range(4)))
    worker.slow.confirmation("part 0").set_result(None)
    await worker.slow.until(*(f"part {number}" for number in range(5)))
    assert worker.parts == [(1, 6)]
    worker.unwanted.add(1)  # there is newer work
    worker.slow.confirmation("part 1").set_result(None)
    worker.answers.put(job(2))
    await worker.slow.until(*(f"part {number}" for number in range(5)), "update 2")
    worker.slow.confirmation("update 2").set_result(None)
    await asyncio.to_thread(worker.answers.residual)
    assert (worker.confirmed, worker.events) == ([2], [])


async def test_what_was_lost_is_sent_again_while_it_is_wanted(worker, monkeypatch):
    monkeypatch.setattr(answers, "_RETRY_S", 0.0)
    worker.answers.put(job(1))
    worker.answers.put(job(2))
    await worker.slow.until("update 1", "update 2")
    worker.unwanted.add(1)
    lost, worker.slow = worker.slow, Slow()
    for number in (1, 2):
        lost.confirmation(f"update {number}").set_exception(LinkLost("the connection was closed"))
    await worker.slow.until("update 2")
    worker.slow.confirmation("update 2").set_result(None)
    await asyncio.to_thread(worker.answers.residual)
    assert (worker.confirmed, worker.events) == ([2], ["unsent", "unsent"])


async def test_a_queue_that_stays_full_is_reported_once(worker, monkeypatch):
    monkeypatch.setattr(answers, "_RETRY_S", 0.0)
    worker.answers.put(job(1))
    for tried in range(1, 4):
        await worker.slow.until("update 1")
        full, worker.slow = worker.slow, Slow()
        reason = QueueFull("full") if tried < 3 else LinkLost("the connection was closed")
        full.confirmation("update 1").set_exception(reason)
    await worker.slow.until("update 1")
    assert worker.events == ["unsent"] * 2  # for the full queue, and for the lost link


async def test_what_an_update_left_goes_into_no_other_than_the_next_although_that_may_be_lost(
    worker, monkeypatch
):
    monkeypatch.setattr(answers, "_RETRY_S", 0.0)
    jobs = {number: job(number) for number in (1, 2)}
    for number, one in jobs.items():
        one.residual = Residual(one.work, {"w": np.full(3, float(number))})
    worker.answers.put(jobs[1])
    await worker.slow.until("update 1")
    worker.slow.confirmation("update 1").set_result(None)
    left = await asyncio.to_thread(worker.answers.residual)
    assert left.before(jobs[2].work)["w"].tolist() == [1, 1, 1]  # update 2 is made with these
    worker.answers.put(jobs[2])
    await worker.slow.until("update 1", "update 2")
    worker.unwanted.add(2)  # there is newer work, perhaps because update 2 arrived
    worker.slow.confirmation("update 2").set_exception(LinkLost("the connection was closed"))
    await asyncio.sleep(0)
    left = await asyncio.to_thread(worker.answers.residual)
    assert not left.before(job(3).work)


async def test_what_an_update_left_remains_if_the_next_was_not_sent_to_its_end(worker):
    first, large = job(1), job(2, 6 * PART_BYTES // 4)
    first.residual = Residual(first.work, {"w": np.ones(3)})
    worker.answers.put(first)
    await worker.slow.until("update 1")
    worker.slow.confirmation("update 1").set_result(None)
    await asyncio.to_thread(worker.answers.residual)
    worker.answers.put(large)
    await worker.slow.until("update 1", *(f"part {number}" for number in range(4)))
    worker.unwanted.add(2)
    for number in range(4):
        worker.slow.confirmation(f"part {number}").set_result(None)
    left = await asyncio.to_thread(worker.answers.residual)
    assert left.before(job(3).work)["w"].tolist() == [1, 1, 1]
