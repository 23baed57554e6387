"""Exchanges, bindings and queues that somebody deletes in the middle of a run."""

from __future__ import annotations

import asyncio

import pytest

from fluffle_common.errors import BrokerError
from fluffle_common.protocol.topology import Binding
from fluffle_common.transport.memory import MemoryLink
from tests.federation.harness import NAME, Adder
from tests.federation.line import cut_at_first

VALUES = {"a": 1.0, "b": 2.0, "c": 5.0}


async def in_round_1(federation):
    """Start a federation; return its coordinator as soon as its workers train."""
    for name, value in VALUES.items():
        federation.worker(name, Adder(federation.loop, value, int(10 * value), step_s=5.0))
    coordinator = federation.coordinator(rounds=2, min_workers=3)
    await coordinator.log.until("opened")
    return coordinator


async def check(federation, coordinator):
    assert (await coordinator.end()).outcome == "finished"
    assert federation.participants() == [["a", "b", "c"]] * 2
    federation.check_averages(VALUES)
    assert not coordinator.log.of("reopened")


@pytest.mark.parametrize("kind", ["results", "work"])
def test_a_deleted_exchange_is_declared_again(federated, kind):
    async def scenario(federation):
        coordinator = await in_round_1(federation)
        federation.broker.delete_exchange(getattr(federation.topology, kind))
        await check(federation, coordinator)
        [lost] = coordinator.log.of("disconnected")
        assert lost["reason"] == f"an exchange or queue of federation {NAME} is gone"

    federated(scenario)


@pytest.mark.parametrize("kind", ["update", "heartbeat"])
def test_a_deleted_shared_binding_is_made_again(federated, kind):
    async def scenario(federation):
        coordinator, topology = await in_round_1(federation), federation.topology
        queue = topology.updates if kind == "update" else topology.presence
        federation.broker.bindings.discard(Binding(queue, topology.results, f"{kind}.#"))
        await check(federation, coordinator)
        assert not coordinator.log.of("disconnected")

    federated(scenario)


@pytest.mark.parametrize("kind", ["journal", "rejected", "unrouted"])
def test_a_deleted_queue_without_a_consumer_is_declared_again(federated, kind):
    async def scenario(federation):
        coordinator = await in_round_1(federation)
        queue = getattr(federation.topology, kind)
        federation.broker.delete(queue)
        await check(federation, coordinator)
        assert queue in federation.broker.queues

    federated(scenario)


def test_a_worker_whose_binding_was_deleted_is_bound_before_it_is_asked_again(federated):
    async def scenario(federation):
        coordinator = await in_round_1(federation)
        for binding in federation.topology.bindings_of("b"):
            federation.broker.bindings.discard(binding)
        assert (await coordinator.end()).outcome == "finished"
        assert len(coordinator.log.of("reopened")) == 1
        assert federation.participants() == [["a", "b", "c"]] * 2
        federation.check_averages(VALUES)

    federated(scenario)


def test_a_round_is_opened_again_although_a_worker_has_answered_and_left(federated):
    async def scenario(federation):
        coordinator = await in_round_1(federation)
        for binding in federation.topology.bindings_of("b"):
            federation.broker.bindings.discard(binding)
        await coordinator.log.until("counted", 5)  # b misses the work of round 2
        await federation.processes[0].stop()
        assert (await coordinator.end()).outcome == "finished"
        [reopened] = coordinator.log.of("reopened")
        assert reopened["asked"] == ["a", "b", "c"]
        assert federation.participants() == [["a", "b", "c"]] * 2

    federated(scenario)


@pytest.mark.usefixtures("in_parts")
def test_an_outbox_without_its_binding_is_bound_before_its_parts_are_asked_for_again(federated):
    async def scenario(federation):
        coordinator = await in_round_1(federation)
        _, of_outbox = federation.topology.bindings_of("b")
        federation.broker.bindings.discard(of_outbox)
        await check(federation, coordinator)
        [resend] = coordinator.log.of("resend")
        assert resend["worker"] == "b"

    federated(scenario)


def test_a_permission_that_only_binding_needs_may_be_taken_away(federated, monkeypatch):
    async def refuse(*_):
        raise BrokerError("the broker does not let user 'c' read exchange 'letters.results'")

    async def scenario(federation):
        coordinator = await in_round_1(federation)
        monkeypatch.setattr(MemoryLink, "bind", refuse)
        await check(federation, coordinator)

    federated(scenario)


@pytest.mark.parametrize("in_parts", [True], indirect=True)
@pytest.mark.parametrize("after_s", [1.0, 4.5, 5.0, 6.0])
def test_after_a_move_to_an_empty_broker_no_part_of_an_update_misses_its_outbox(
    federated, after_s, in_parts
):
    async def scenario(federation):
        coordinator, broker = await in_round_1(federation), federation.broker
        await asyncio.sleep(after_s)
        broker.stop()
        for exchange in list(broker.exchanges):
            broker.delete_exchange(exchange)
        broker.queues.clear()
        await asyncio.sleep(20.0)
        broker.up = True
        await check(federation, coordinator)
        assert not broker.queues[federation.topology.unrouted].ready
        assert not coordinator.log.of("resend")

    federated(scenario)


def test_workers_are_bound_before_they_are_asked_over_a_new_link(federated, monkeypatch):
    cut = cut_at_first(monkeypatch, "bind")

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, min_workers=1)
        worker = federation.worker("a")
        await coordinator.log.until("opened", within_s=60.0)  # not after --deadline
        await coordinator.end()
        assert cut
        assert worker.log.of("welcome")

    federated(scenario)
