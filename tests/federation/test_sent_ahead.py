"""A model in parts is sent while its checkpoint is being written, except its last part."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from fluffle_coordinator.service import outbox
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_coordinator.user_code.strategy_loading import load_strategy
from tests.federation.test_faults import VALUES, start

ROUNDS = 3
pytestmark = pytest.mark.usefixtures("in_parts")


@pytest.fixture
def in_full(monkeypatch) -> list[str]:
    """Return the kind of each message that is sent with all its tensors."""
    kinds, real = list[str](), outbox.send_tensors

    async def send_tensors(link, message, *on, **how):
        kinds.append(message.kind)
        await real(link, message, *on, **how)

    monkeypatch.setattr(outbox, "send_tensors", send_tensors)
    return kinds


class FullDisk:
    """Refuses the checkpoint of round 1 until it is told to accept it."""

    def __init__(self, monkeypatch) -> None:
        self.full, save = True, RunStore.save_weights

        def save_weights(store: RunStore, number: int, *on: Any) -> Any:
            if number and self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return save(store, number, *on)

        monkeypatch.setattr(RunStore, "save_weights", save_weights)


def while_written(federated, monkeypatch, happens: Callable[..., Any], workers: str = "ab") -> None:
    """Play a run in which something happens while the first checkpoint is being written."""

    async def scenario(federation) -> None:
        disk = FullDisk(monkeypatch)
        running = {name: start(federation, name) for name in workers}
        coordinator = federation.coordinator(rounds=ROUNDS, min_workers=len(workers))
        await coordinator.log.until("disk")
        await asyncio.sleep(1.0)
        for worker in running.values():
            _, assembly = worker.service._assembly
            assert assembly.transfer.parts - assembly.done_parts == 1
        coordinator = await happens(federation, coordinator, running) or coordinator
        await asyncio.sleep(20.0)
        assert all(round_ == 1 for w in running.values() for round_ in begun(w))
        disk.full, began = False, federation.loop.time()
        assert (await coordinator.end()).outcome == "finished"
        assert federation.loop.time() - began < 20.0
        assert [line["round"] for line in federation.history()] == [*range(1, ROUNDS + 1)]
        federation.check_averages(VALUES)
        assert coordinator.log.of("outdated") == []

    federated(scenario)


def begun(worker) -> list[int]:
    return [event["round"] for event in worker.log.of("begun")]


def test_no_part_is_sent_twice(federated, monkeypatch, in_full):
    async def nothing(*_: Any) -> None:
        pass

    while_written(federated, monkeypatch, nothing)
    assert in_full == ["fit", "evaluate"]


def test_it_is_sent_in_full_once_a_worker_has_joined(federated, monkeypatch, in_full):
    async def joins(federation, *_: Any) -> None:
        start(federation, "c")

    while_written(federated, monkeypatch, joins)
    assert in_full == ["fit", "fit", "evaluate"]


def test_a_worker_that_restarts_meanwhile_gets_it_in_full(federated, monkeypatch, in_full):
    async def restarts(federation, _, workers) -> None:
        await workers["a"].kill()
        await asyncio.sleep(1.0)
        workers["a"] = start(federation, "a")

    while_written(federated, monkeypatch, restarts)
    assert in_full == ["fit", "fit", "evaluate"]


def test_a_private_model_leaves_only_after_its_commit(federated, monkeypatch, in_full):
    strategy = load_strategy("dp:clip=1,noise=4,workers=2")

    async def scenario(federation) -> None:
        disk = FullDisk(monkeypatch)
        workers = [start(federation, name) for name in "ab"]
        coordinator = federation.coordinator(rounds=2, min_workers=2, strategy=strategy)
        await coordinator.log.until("disk")
        await asyncio.sleep(20.0)
        assert [worker.service._assembly for worker in workers] == [None, None]
        disk.full = False
        assert (await coordinator.end()).outcome == "finished"
        assert in_full == ["fit", "fit", "evaluate"]

    federated(scenario)


@pytest.mark.parametrize("whose", ["coordinator", "a"])
def test_after_a_lost_link_it_is_sent_in_full(federated, monkeypatch, in_full, whose):
    async def cut(_, coordinator, workers) -> None:
        {**workers, "coordinator": coordinator}[whose].line.cut()

    while_written(federated, monkeypatch, cut)
    assert in_full == ["fit", "fit", "evaluate"]


def test_nobody_trains_from_a_model_that_its_coordinator_did_not_store(federated, monkeypatch):
    async def dies(federation, coordinator, workers) -> Any:
        await coordinator.kill()
        await asyncio.sleep(30.0)
        return federation.coordinator(rounds=ROUNDS, min_workers=len(workers))

    while_written(federated, monkeypatch, dies)
