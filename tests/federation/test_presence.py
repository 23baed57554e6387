"""Presence: which workers count as present or gone, and when a round closes without them."""

from __future__ import annotations

import asyncio

import pytest

from fluffle_common.protocol.events import Resumed, from_fields
from fluffle_common.protocol.messages import Stop
from fluffle_common.transport.base import Properties
from fluffle_common.transport.memory import MemoryLink
from fluffle_common.transport.messaging import Route, send
from fluffle_coordinator.observe.run_view import RunView
from fluffle_coordinator.service import outbox, topology_watch
from tests.federation.harness import NAME, Adder
from tests.federation.line import cut_at_first

VALUES = {"a": 1.0, "b": 2.0, "c": 5.0}


def three(federation, **options):
    for name, value in VALUES.items():
        federation.worker(name, Adder(federation.loop, value, int(10 * value), **options))


def test_a_federation_runs(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=3, min_workers=3)
        three(federation)
        state = await coordinator.end()
        assert (state.outcome, state.reason) == ("finished", "3 rounds are done")
        assert federation.participants() == [["a", "b", "c"]] * 3
        federation.check_averages(VALUES)
        assert len(federation.history("evaluated")) == 3

    federated(scenario)


def test_a_worker_says_once_that_the_broker_still_holds_its_earlier_connection(federated):
    async def scenario(federation):
        federation.coordinator(rounds=1, min_workers=2)
        worker = federation.worker("a", Adder(federation.loop))
        await worker.log.until("connected")
        worker.line.cut()
        earlier = await federation.broker.open()
        deliveries = await earlier.consume(f"{NAME}.inbox.a", prefetch=1, exclusive=True)
        waiting = await worker.log.until("waiting")
        assert waiting["what"] == "connection"
        await asyncio.sleep(60.0)
        assert len([x for x in worker.log.of("waiting") if x["what"] == "connection"]) == 1
        await deliveries.aclose()
        earlier.cut()
        await worker.log.until("connected", 2)

    federated(scenario)


def test_a_worker_looks_less_and_less_often_for_a_coordinator(federated, monkeypatch):
    looks, exists = [], MemoryLink.exists

    async def counted(self: MemoryLink, exchange: str) -> bool:
        looks.append(exchange)
        return await exists(self, exchange)

    async def scenario(federation):
        federation.worker("a", Adder(federation.loop))
        await asyncio.sleep(600.0)
        assert 120 <= len(looks) <= 130  # the broker logs each
        coordinator = federation.coordinator(rounds=1, min_workers=1)
        assert (await coordinator.end()).outcome == "finished"

    monkeypatch.setattr(MemoryLink, "exists", counted)
    federated(scenario)


def test_a_link_lost_before_the_inbox_is_read_leaves_nothing_there_for_an_earlier_process(
    federated, monkeypatch
):
    async def scenario(federation):
        topology = federation.topology
        link = await federation.broker.open()
        await link.declare([*topology.shared(), *topology.of_worker("a")])
        stop = Stop(federation=NAME, run="earlier", round=9, outcome="finished", reason="earlier")
        await send(link, stop, Route("", [topology.inbox("a")]))
        await link.close()
        cut_at_first(monkeypatch, "counts")
        worker = federation.worker("a")
        await worker.log.until("disconnected")
        federation.coordinator(rounds=1, min_workers=1)
        assert await worker.end() == "1 round is done"

    federated(scenario)


@pytest.mark.parametrize("after_s", [0.3, 1.1, 1.9])
def test_no_worker_is_gone_after_the_coordinator_was_stopped(federated, after_s):
    async def scenario(federation):
        three(federation, step_s=2.0)
        coordinator = federation.coordinator(rounds=3, min_workers=3)
        await coordinator.log.until("opened")
        await coordinator.log.until("counted")
        await asyncio.sleep(after_s)
        await federation.freeze(coordinator, 15.0)
        await coordinator.end()
        assert not coordinator.log.of("gone")
        assert not coordinator.log.of("quorum")
        assert federation.participants() == [["a", "b", "c"]] * 3
        federation.check_averages(VALUES)

    federated(scenario)


async def one_of_three_left_alone(federation, rounds):
    """Stop the coordinator in round 1, and return a worker that has sent its update."""
    coordinator = federation.coordinator(rounds=rounds, min_workers=3)
    three(federation, step_s=2.0)
    await coordinator.log.until("opened")
    await coordinator.stop()
    worker = federation.processes[1]
    await worker.log.until("sent")
    return worker


def test_a_worker_reports_that_it_waits_for_a_coordinator_that_was_stopped(federated):
    async def scenario(federation):
        worker = await one_of_three_left_alone(federation, rounds=2)
        event = await worker.log.until("waiting")
        assert event["reason"].startswith("round 1: no new work since the update was sent 15 s ago")
        await asyncio.sleep(100.0)
        assert len(worker.log.of("waiting")) == 1
        again = federation.coordinator(rounds=2, min_workers=3)
        await again.log.until("opened")
        assert (await again.end()).outcome == "finished"

    federated(scenario)


def test_a_worker_does_not_suspect_the_coordinator_while_the_broker_accepts_nothing(federated):
    async def scenario(federation):
        federation.broker.blocking.set("low on disk")
        worker = federation.worker("a")
        coordinator = federation.coordinator(rounds=1, min_workers=1)
        await asyncio.sleep(100.0)
        assert not worker.log.of("waiting")
        federation.broker.blocking.set(None)
        assert (await coordinator.end()).outcome == "finished"

    federated(scenario)


def test_a_worker_that_has_lost_the_broker_does_not_suspect_the_coordinator(federated):
    async def scenario(federation):
        worker = await one_of_three_left_alone(federation, rounds=1)
        federation.broker.stop()
        await asyncio.sleep(40.0)
        assert worker.log.of("no_broker")
        assert not worker.log.of("waiting")
        federation.broker.up = True
        event = await worker.log.until("waiting")
        assert event["reason"].startswith("round 1: no new work since the update was sent 15 s ago")

    federated(scenario)


def test_updates_that_waited_for_a_restarted_coordinator_are_shown_in_their_round(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, min_workers=3)
        three(federation, step_s=2.0)
        await coordinator.log.until("opened", 2)
        await coordinator.stop()
        for worker in federation.processes[1:]:
            await worker.log.until("sent", 2)
        again = federation.coordinator(rounds=2, min_workers=4)  # so that it opens later
        await again.log.until("committed")
        view = RunView()
        for at, name, fields in coordinator.log.lines:
            view.add(at, from_fields(name, fields))
        view.add(at, Resumed(run="r", rounds=2, round=1))
        for at, name, fields in again.log.lines:
            view.add(at, from_fields(name, fields))
        counted = [name for _, name, _ in again.log.lines if name in ("counted", "opened")]
        assert counted == ["counted", "counted", "counted", "opened"]
        assert sorted(view.rounds[2].answers) == ["a", "b", "c"]
        await again.end()

    federated(scenario)


def test_no_worker_is_gone_after_the_broker_blocked_publishers(federated):
    async def scenario(federation):
        three(federation, step_s=2.0)
        coordinator = federation.coordinator(rounds=2, min_workers=3)
        await coordinator.log.until("opened")
        await federation.block(19.0)
        await coordinator.end()
        assert not coordinator.log.of("gone")
        assert federation.participants() == [["a", "b", "c"]] * 2

    federated(scenario)


def test_a_lost_worker_is_gone_and_counts_again_after_its_return(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=3, min_workers=2)
        three(federation, step_s=3.0)
        await coordinator.log.until("opened")
        await federation.processes[3].kill()
        event = await coordinator.log.until("quorum")
        assert event == {"round": 1, "needed": 2, "was": 3, "reason": "c is gone"}
        await coordinator.log.until("opened", 2)
        federation.worker("c", Adder(federation.loop, VALUES["c"], 50))
        await coordinator.end()
        assert federation.participants()[0] == ["a", "b"]
        assert federation.participants()[-1] == ["a", "b", "c"]
        federation.check_averages(VALUES)

    federated(scenario)


@pytest.mark.parametrize("silent_s", [1.0, 30.0, 55.0])
def test_old_heartbeats_of_dead_workers_open_no_round(federated, silent_s):
    async def scenario(federation):
        first = federation.coordinator(rounds=1, min_workers=9)
        three(federation)
        await first.log.until("joined", 3)
        await first.kill()
        await asyncio.sleep(10)  # their heartbeats pile up in the queue
        for process in federation.processes[2:]:
            await process.kill()
        await asyncio.sleep(silent_s)
        coordinator = federation.coordinator(rounds=1, min_workers=3, least=3)
        await asyncio.sleep(120)
        assert [event["worker"] for event in coordinator.log.of("joined")] == ["a"]
        assert not coordinator.log.of("opened")
        for name in "bc":
            federation.worker(name, Adder(federation.loop, VALUES[name], int(10 * VALUES[name])))
        await coordinator.end()
        assert federation.participants() == [["a", "b", "c"]]

    federated(scenario)


def test_no_round_commits_with_fewer_updates_than_least(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, min_workers=3, least=3)
        three(federation, step_s=3.0)
        await coordinator.log.until("opened")
        await federation.processes[2].kill()
        await federation.processes[3].stop()
        await asyncio.sleep(300)
        assert not coordinator.log.of("committed")
        for name in "bc":
            federation.worker(name, Adder(federation.loop, VALUES[name], int(10 * VALUES[name])))
        await coordinator.end()
        assert federation.participants() == [["a", "b", "c"]] * 2
        federation.check_averages(VALUES)

    federated(scenario)


def test_late_joiners_are_asked_and_leavers_are_not_waited_for(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=4, min_workers=2)
        a, b = federation.workers(2, task=None)
        await coordinator.log.until("opened")
        federation.worker("c", Adder(federation.loop))
        await coordinator.log.until("committed", 2)
        await b.stop()
        state = await coordinator.end()
        assert state.outcome == "finished"
        assert "c" in federation.participants()[1]
        assert federation.participants()[-1] == ["a", "c"]
        assert [event["worker"] for event in coordinator.log.of("left")][:1] == ["b"]
        await a.end()

    federated(scenario)


def test_workers_and_coordinator_start_in_any_order(federated):
    async def scenario(federation):
        three(federation)
        await asyncio.sleep(40)
        assert [waiting["reason"] for waiting in federation.processes[0].log.of("waiting")] == [
            f"no coordinator of federation {NAME} has answered for {seconds} s; start it at any "
            "time, or correct --federation"
            for seconds in (15, 30)
        ]
        coordinator = federation.coordinator(rounds=1, min_workers=3)
        began = federation.loop.time()
        await coordinator.log.until("opened")
        assert federation.loop.time() - began < 2.0  # the workers are asked to greet at once
        await coordinator.end()

    federated(scenario)


@pytest.mark.parametrize(("step_s", "expected"), [(1.0, []), (4.0, [10.0] * 5)])
def test_a_round_reports_what_it_waits_for_after_ten_seconds(federated, step_s, expected):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=5, min_workers=3)
        await asyncio.sleep(7.0)
        three(federation, step_s=step_s)
        await coordinator.end()
        opened = {f["round"]: at for at, name, f in coordinator.log.lines if name == "opened"}
        waited = [
            at - opened[f["round"]]
            for at, name, f in coordinator.log.lines
            if name == "waiting" and f["what"] == "updates"
        ]
        assert waited == pytest.approx(expected, abs=0.3)

    federated(scenario)


def test_rejections_that_wait_behind_a_large_model_do_not_delay_heartbeats(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(min_workers=2)
        await coordinator.log.until("connected")
        sent = asyncio.Event()
        coordinator.service._outbox._jobs.put(sent.wait)  # a model on a slow line
        link = await federation.broker.open()
        presence = [federation.topology.presence]
        for _ in range(500):  # the heartbeats of a few workers of another version
            await link.publish(b"garbage", Properties(), exchange="", keys=presence)
        federation.worker("a")
        await coordinator.log.until("joined", within_s=60)
        sent.set()

    federated(scenario)


def test_a_worker_that_reconnects_is_heard_while_its_inbox_arrives_slowly(federated):
    async def scenario(federation):
        coordinator = federation.coordinator(rounds=2, min_workers=3)
        three(federation, step_s=2.0)
        slow = federation.processes[-1]
        await coordinator.log.until("opened")
        slow.line.hold(incoming=True)
        slow.line.cut()
        await asyncio.sleep(60.0)
        slow.line.release()
        await coordinator.end()
        assert not coordinator.log.of("gone")
        assert federation.participants() == [["a", "b", "c"]] * 2
        federation.check_averages(VALUES)

    federated(scenario)


def test_over_a_slow_line_the_coordinator_sends_each_model_once(federated, monkeypatch):
    sent, real = [], outbox.send_tensors

    async def send_tensors(link, message, *on, **how):
        sent.append(message.kind)
        await real(link, message, *on, **how)

    monkeypatch.setattr(outbox, "send_tensors", send_tensors)

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=3, min_workers=3)
        coordinator.line.bytes_per_s = 4_000.0  # 100 s for a model
        three(federation, size=100_000)
        await coordinator.end()
        assert sent == ["fit", "fit", "fit", "evaluate"]
        federation.check_averages(VALUES)

    federated(scenario)


def test_over_a_slow_line_each_worker_is_bound_once(federated, monkeypatch):
    bind, bound = MemoryLink.bind, []

    async def bind_slowly(link, bindings):
        bindings = list(bindings)
        bound.append({binding.queue for binding in bindings})
        await asyncio.sleep(8.0)
        return await bind(link, bindings)

    monkeypatch.setattr(MemoryLink, "bind", bind_slowly)
    monkeypatch.setattr(topology_watch, "_EVERY_S", 3600.0)

    async def scenario(federation):
        three(federation)
        coordinator = federation.coordinator(rounds=2, min_workers=3)
        await coordinator.end()
        # Although signs of life came every 2 s. The one asked for first weights is bound again.
        assert len(bound) == 4
        federation.check_averages(VALUES)

    federated(scenario)


def test_a_worker_that_joins_a_finished_run_joins_its_last_round(federated):
    async def scenario(federation):
        for _ in range(2):
            worker = federation.worker("a")
            await federation.coordinator(rounds=2, min_workers=1).end()
            await worker.end()
        (welcome,) = worker.log.of("welcome")
        assert (welcome["round"], welcome["rounds"]) == (2, 2)

    federated(scenario)
