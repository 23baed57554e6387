"""A two-phase protocol that fluffle does not know, and messages that have no handler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import wire_format
from fluffle_common.protocol.exchanges import Sent, handle_exchange
from fluffle_common.protocol.messages import Exchange
from tests.federation.harness import NAME, Adder


def sum_exchange(phase: str, **fields: Any) -> Exchange:
    return Exchange(federation=NAME, name="sum", phase=phase, round=1, **fields)


def slow(federation) -> Adder:
    return Adder(federation.loop, steps=40)


async def began(coordinator) -> str:
    """Wait until a round has begun; return the run's id."""
    await coordinator.log.until("opened")
    return coordinator.service.state.run


def test_handlers_on_both_sides_exchange_messages(federated):
    numbers = {"a": 3.0, "b": 4.0}
    totals: dict[str, list[float]] = {name: [] for name in numbers}
    shares: dict[str, float] = {}

    def collect(message: Exchange, tensors: Any) -> list[Sent]:
        shares[message.worker] = float(tensors["share"])
        if shares.keys() < numbers.keys():
            return []
        total = {"total": np.array(sum(shares.values()))}
        return [Sent(sum_exchange("total", run=message.run), total, tuple(numbers))]

    def takes_part(worker: str) -> Any:
        def handle(message: Exchange, tensors: Any) -> list[Sent]:
            if message.phase == "begin":
                share = {"share": np.array(numbers[worker])}
                return [Sent(sum_exchange("share", run=message.run, worker=worker), share)]
            totals[worker].append(float(tensors["total"]))
            return []

        return handle

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1, exchanges={"sum": collect})
        for name in numbers:
            exchanges = {"sum": takes_part(name)}
            federation.worker(name, slow(federation), exchanges=exchanges)
        run = await began(coordinator)
        begin = Sent(sum_exchange("begin", run=run), {}, tuple(numbers))
        coordinator.service.exchange(begin)
        assert (await coordinator.end()).outcome == "finished"
        assert totals == {"a": [7.0], "b": [7.0]}
        assert not coordinator.log.of("rejected")

    federated(scenario)


def test_an_exchange_without_a_handler_is_rejected_on_both_sides(federated):
    def asks(message: Exchange, tensors: Any) -> list[Sent]:
        return [Sent(sum_exchange("more", run=message.run, worker="a"))]

    async def scenario(federation):
        coordinator = federation.coordinator(rounds=1)
        federation.worker("a", slow(federation), exchanges={"sum": asks})
        b = federation.worker("b", slow(federation), exchanges={"product": asks})
        run = await began(coordinator)
        begin = Sent(sum_exchange("begin", run=run), {}, ("a", "b"))
        coordinator.service.exchange(begin)
        assert (await coordinator.end()).outcome == "finished"
        reason = "there is no handler for the exchange 'sum' (exchanges with a handler: {})"
        (rejected,) = coordinator.log.of("rejected")
        assert rejected["reason"] == reason.format("none")
        assert rejected["cause"] == "exchange"
        assert [one["reason"] for one in b.log.of("rejected")] == [reason.format("product")]

    federated(scenario)


def test_a_failing_handler_is_reported_in_one_line():
    def fails(message: Exchange, tensors: Any) -> list[Sent]:
        raise RuntimeError("no\nkey")

    message, payload = wire_format.decode(Sent(sum_exchange("begin", run="r")).body())
    with pytest.raises(MalformedMessage, match="of the exchange 'sum' fails: RuntimeError: no key"):
        handle_exchange({"sum": fails}, message, payload)


def test_the_tensors_of_an_exchange_must_fit_into_one_message():
    large = {"x": np.zeros(wire_format.PART_BYTES + 1, np.uint8)}
    with pytest.raises(ValueError, match=r"have 4194305 bytes; the limit is 4194304"):
        Sent(sum_exchange("begin", run="r"), large).body()
