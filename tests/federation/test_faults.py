"""Kills processes and cuts lines at any time: no update is lost, and none counts twice."""

from __future__ import annotations

import asyncio
import errno
import os
import random

import pytest

from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import UnknownQueueType
from fluffle_common.transport.memory import MemoryLink
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.storage import update_archive as archive
from tests.federation.harness import NAME, Adder

BOTH = pytest.mark.parametrize(
    "in_parts", [False, True], ids=["in one message", "in parts"], indirect=True
)
VALUES = {"a": 1.0, "b": 2.0, "c": 5.0}


def start(federation, name, **options):
    value = VALUES[name]
    return federation.worker(name, Adder(federation.loop, value, int(10 * value), **options))


@BOTH
@pytest.mark.parametrize("after_s", [0.0, 0.4, 0.9, 1.0, 1.001, 1.3, 2.1, 2.6])
def test_a_coordinator_killed_at_any_time_resumes(federated, after_s, in_parts):
    async def scenario(federation):
        for name in VALUES:
            start(federation, name)
        first = federation.coordinator(rounds=4, min_workers=3)
        await first.log.until("opened")
        await asyncio.sleep(after_s)
        await first.kill()
        second = federation.coordinator(rounds=4, min_workers=3)
        assert (await second.end()).outcome == "finished"
        assert [line["round"] for line in federation.history()] == [1, 2, 3, 4]
        federation.check_averages(VALUES)

    federated(scenario)


def test_a_stopped_coordinator_says_so_and_leaves_no_timer(federated):
    async def scenario(federation):
        start(federation, "a")
        coordinator = federation.coordinator(min_workers=2)
        await coordinator.log.until("joined")
        await asyncio.sleep(2.5)  # between two ticks
        await coordinator.stop()
        assert coordinator.log.lines[-1][1] == "interrupted"
        assert coordinator.service._next_tick.cancelled()

    federated(scenario)


def test_a_stopped_coordinator_does_nothing_while_its_journal_is_published(federated):
    async def scenario(federation):
        start(federation, "a")
        coordinator = federation.coordinator(min_workers=2)
        await coordinator.log.until("joined")
        coordinator.line.hold(outgoing=True)
        start(federation, "b")
        begun = federation.loop.time()
        await coordinator.stop()
        assert federation.loop.time() - begun == pytest.approx(2.0)
        assert coordinator.log.lines[-1][1] == "interrupted"

    federated(scenario)


@pytest.mark.usefixtures("in_parts")
def test_first_weights_are_asked_for_again_if_their_parts_are_lost(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2)
        for name in VALUES:
            start(federation, name)
        asked = (await coordinator.log.until("init"))["worker"]
        coordinator.line.hold(incoming=True)
        outbox = federation.broker.queues[federation.topology.outbox(asked)]
        async with asyncio.timeout(60.0):
            while not outbox.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        outbox.ready.clear()
        coordinator.line.release()
        await coordinator.log.until("init", 2, within_s=60.0)  # not only after the deadline
        assert (await coordinator.end()).outcome == "finished"
        federation.check_averages(VALUES)

    federated(scenario)


def test_first_weights_arrive_although_the_outbox_is_not_bound(federated, in_parts):
    async def scenario(federation):
        workers = [start(federation, name) for name in VALUES]
        coordinator = federation.coordinator(rounds=2, min_workers=len(VALUES))
        await coordinator.log.until("joined", len(VALUES))
        bindings = federation.broker.bindings
        for binding in [one for one in bindings if "outbox" in one.queue]:
            bindings.discard(binding)
        assert (await coordinator.end()).outcome == "finished"
        federation.check_averages(VALUES)
        assert len(coordinator.log.of("init")) <= 2
        for worker in workers:
            await worker.end()

    federated(scenario)


def test_a_run_works_without_a_journal_if_the_broker_has_no_streams(federated, monkeypatch):
    declare = MemoryLink.declare

    async def without_streams(link, entities):
        if Topology(NAME).journal_stream() in entities:
            raise UnknownQueueType("no streams")
        await declare(link, entities)

    async def scenario(federation):
        monkeypatch.setattr(MemoryLink, "declare", without_streams)
        start(federation, "a", step_s=60.0)  # so that the missing queue would be noticed
        coordinator = federation.coordinator(rounds=2, min_workers=1)
        assert (await coordinator.end()).outcome == "finished"
        assert len(coordinator.log.of("no_journal")) == 1
        assert len(coordinator.line.links) == 1

    federated(scenario)


def test_a_coordinator_stopped_while_it_sends_its_last_events_leaves_the_broker(
    federated, monkeypatch
):
    monkeypatch.setattr(Journal, "drained", lambda *_: asyncio.sleep(2.0))

    async def scenario(federation):
        federation.workers(2)
        coordinator = federation.coordinator(rounds=1)
        await coordinator.log.until("finished")
        await asyncio.sleep(1.0)
        await coordinator.stop()
        assert not federation.broker.queues[federation.topology.presence].consumers

    federated(scenario)


def test_updates_that_wait_for_the_disk_are_not_missing_at_the_deadline(federated, monkeypatch):
    keep_update = archive.keep_update

    async def scenario(federation):
        full_until = federation.loop.time() + 60

        def full_for_a_minute(*update):
            if federation.loop.time() < full_until:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            keep_update(*update)

        monkeypatch.setattr(archive, "keep_update", full_for_a_minute)
        for name in VALUES:
            start(federation, name)
        rules = {"rounds": 2, "min_workers": 3, "deadline_s": 10, "on_deadline": "stop"}
        coordinator = federation.coordinator(**rules, keep_updates=True)
        assert (await coordinator.end()).outcome == "finished"
        assert federation.loop.time() > full_until
        assert coordinator.log.of("disk")
        federation.check_averages(VALUES)

    federated(scenario)


@BOTH
@pytest.mark.parametrize("after_s", [0.0, 0.5, 1.0, 1.5, 2.2, 3.0])
def test_a_worker_killed_at_any_time_returns(federated, after_s, in_parts):
    async def scenario(federation):
        workers = [start(federation, name) for name in VALUES]
        coordinator = federation.coordinator(rounds=5, min_workers=3)
        await coordinator.log.until("opened")
        await asyncio.sleep(after_s)
        await workers[1].kill()
        await asyncio.sleep(1.0)
        start(federation, "b")
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants()[-1] == ["a", "b", "c"]
        federation.check_averages(VALUES)

    federated(scenario)


KINDS = ["hello", "heartbeat", "update", "evaluation", "first_weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_workers_line_cut_at_any_message_loses_nothing(federated, kind):
    async def scenario(federation):
        workers = [start(federation, name) for name in VALUES]
        for worker in workers:
            worker.line.lose_next = {kind}
        coordinator = federation.coordinator(rounds=3, min_workers=3, least=3)
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["a", "b", "c"]] * 3
        federation.check_averages(VALUES)

    federated(scenario)


@BOTH
@pytest.mark.parametrize(
    "kind", ["welcome", "init_request", "fit", "part", "echo", "evaluate", "event"]
)
def test_the_coordinators_line_cut_at_any_message_loses_nothing(federated, kind, in_parts):
    async def scenario(federation):
        for name in VALUES:
            start(federation, name)
        coordinator = federation.coordinator(rounds=3, min_workers=3, least=3)
        coordinator.line.lose_next = {kind}
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["a", "b", "c"]] * 3
        federation.check_averages(VALUES)

    federated(scenario)


@pytest.mark.parametrize("step", range(30, 600, 20))
def test_a_line_cut_at_any_step_leaves_room_for_all_updates(federated, monkeypatch, step):
    monkeypatch.setattr("fluffle_coordinator.service.intake._MAX_HELD_BYTES", 1)

    async def scenario(federation):
        for step_s, (name, value) in enumerate(VALUES.items(), 1):
            federation.worker(name, Adder(federation.loop, value, int(10 * value), step_s=step_s))
        coordinator = federation.coordinator(rounds=2, min_workers=3)
        federation.loop.at_step(step, coordinator.line.cut)
        assert (await coordinator.end(within_s=60.0)).outcome == "finished"
        assert coordinator.log.of("disconnected")
        assert federation.participants() == [["a", "b", "c"]] * 2
        federation.check_averages(VALUES)

    federated(scenario)


def test_a_broker_that_dies_and_comes_back_loses_nothing(federated):
    async def scenario(federation):
        for name in VALUES:
            start(federation, name)
        coordinator = federation.coordinator(rounds=4, min_workers=3, least=3)
        for number in (1, 2):
            await coordinator.log.until("counted", 2 * number)
            federation.broker.stop()
            await asyncio.sleep(5)
            federation.broker.up = True
        assert (await coordinator.end()).outcome == "finished"
        assert federation.participants() == [["a", "b", "c"]] * 4
        federation.check_averages(VALUES)

    federated(scenario)


def test_a_standby_takes_over(federated):
    async def scenario(federation):
        for name in VALUES:
            start(federation, name)
        first = federation.coordinator(rounds=4, min_workers=3)
        await first.log.until("opened")
        second = federation.coordinator(rounds=4, min_workers=3)
        await first.log.until("committed", 2)
        await first.kill()
        assert (await second.end()).outcome == "finished"
        assert second.log.of("opened")
        federation.check_averages(VALUES)

    federated(scenario)


def test_a_resumed_run_that_is_done_tells_workers_that_are_heard_later(federated):
    async def scenario(federation):
        workers = [start(federation, name) for name in VALUES]
        await federation.coordinator(rounds=1, min_workers=3).end()
        for worker in workers:
            await worker.end()
        again = federation.coordinator(rounds=1, min_workers=3)
        await again.log.until("connected")
        for name in VALUES:
            await asyncio.sleep(3)
            workers.append(start(federation, name))
        assert (await again.end(within_s=10)).outcome == "finished"
        for worker in workers[3:]:
            await worker.end(within_s=10)

    federated(scenario)


def test_a_standby_with_a_run_folder_of_its_own_reports_it_rarely(federated):
    async def scenario(federation):
        for name in VALUES:
            start(federation, name)
        first = federation.coordinator(rounds=1000, min_workers=3)
        await first.log.until("opened")
        federation.folder = federation.folder.with_name("other")
        second = federation.coordinator(rounds=1, min_workers=3)
        await asyncio.sleep(100)
        assert len(second.log.of("standby")) == 4  # at once, then every 30 s
        await first.kill()
        assert "taking over" in (await second.log.until("note", within_s=5))["what"]
        await second.log.until("connected")

    federated(scenario)


@BOTH
@pytest.mark.parametrize("seed", range(12))
def test_a_rain_of_faults(federated, seed, in_parts):
    """Kill, cut, block and stop at random; the run still finishes with correct averages."""

    async def scenario(federation):
        rng = random.Random(seed)
        workers = {name: start(federation, name) for name in VALUES}
        given = {"rounds": 12, "min_workers": 3, "least": 2, "deadline_s": 60.0}
        coordinator = federation.coordinator(**given)
        await coordinator.log.until("opened")
        for _ in range(8):
            await asyncio.sleep(rng.uniform(0.0, 3.0))
            if coordinator.running.done():
                break
            name = rng.choice("abc")
            match rng.choice(["coordinator", "worker", "cut", "cut", "block", "freeze"]):
                case "coordinator":
                    await coordinator.kill()
                    coordinator = federation.coordinator(**given)
                case "worker":
                    await workers[name].kill()
                    await asyncio.sleep(rng.uniform(0.0, 15.0))
                    workers[name] = start(federation, name)
                case "cut":
                    rng.choice([coordinator, workers[name]]).line.cut()
                case "block":
                    await federation.block(rng.uniform(1.0, 20.0))
                case "freeze":
                    await coordinator.log.until("connected")
                    await federation.freeze(coordinator, rng.uniform(5.0, 30.0))
        assert (await coordinator.end()).outcome == "finished"
        assert [line["round"] for line in federation.history()] == list(range(1, 13))
        assert all(len(who) >= 2 for who in federation.participants())
        federation.check_averages(VALUES)

    federated(scenario)


def test_an_update_keeps_its_weight_if_its_worker_dies_with_the_coordinator(federated):
    async def scenario(federation):
        slow, quick = start(federation, "a", step_s=3.0), start(federation, "c")
        first = federation.coordinator(rounds=3)
        await first.log.until("counted", 3)  # both in the first round, c in the second
        await quick.kill()
        await first.kill()
        second = federation.coordinator(rounds=3, min_workers=1)
        await second.log.until("committed")
        assert federation.participants()[1] == ["a", "c"]
        assert not second.log.of("overweight")
        await second.end()
        await slow.end()
        federation.check_averages(VALUES)

    federated(scenario)
