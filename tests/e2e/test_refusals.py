"""A broker without streams, with a small message limit, and with memory alarms on demand."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluffle_broker.node import node
from fluffle_common.errors import BrokerError
from fluffle_common.protocol.events import Blocked, RunEvent, Unblocked
from fluffle_common.protocol.topology import Queue
from fluffle_common.transport.base import Properties, UnknownQueueType, report_blocking
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from tests.e2e.manage import add_vhost, manage
from tests.e2e.programs import Federation
from tests.shared import shared_node

pytestmark = pytest.mark.rabbit
PATIENCE_S = 60.0
MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def picky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[node.NodeInfo]:
    with contextlib.ExitStack() as stack:
        try:
            info = stack.enter_context(
                shared_node(
                    tmp_path_factory,
                    "picky",
                    extra_conf=f"max_message_size = {MOST_BYTES}",
                    advanced="[{rabbit, [{forced_feature_flags_on_init, [quorum_queue]}]}].",
                )
            )
        except BrokerError as why:
            pytest.skip(f"NOT TESTED on a broker that refuses much, none can be started: {why}")
        yield info


@pytest.fixture
def ctl(picky: node.NodeInfo) -> Callable[..., None]:
    def run(*words: str) -> None:
        command = [str(picky.folder / "rabbitmqctl"), *words]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    return run


@pytest.fixture
def streamless(picky: node.NodeInfo) -> node.NodeInfo:
    if not picky.version.startswith("3."):
        pytest.skip(f"NOT TESTED without streams, RabbitMQ {picky.version} always has them")
    return picky


async def test_missing_streams_are_not_mistaken_for_other_arguments(streamless):
    link = await AmqpTransport(streamless.url, "test").open()
    with pytest.raises(UnknownQueueType):
        await link.declare([Queue("s", "of a test", {"x-queue-type": "stream"})])
    await link.close()


def test_a_run_without_streams_has_no_journal(streamless, tmp_path: Path):
    federation = Federation("f", streamless.url, tmp_path)
    try:
        coordinator = federation.coordinator("--quorum", 2, "--rounds", 2)
        workers = [federation.worker(f"shard:{n}/2") for n in (0, 1)]
        coordinator.wait_for("this run has no journal")
        assert [one.end() for one in (coordinator, *workers)] == [0, 0, 0]
    finally:
        federation.close()
    assert sum("has no journal" in line for line in coordinator.lines) == 1


async def test_a_message_above_the_brokers_limit_names_the_limit(picky):
    link = await AmqpTransport(picky.url, "test").open()
    await link.declare([Queue("q", "of a test")])
    with pytest.raises(BrokerError, match=r"2,000,000 .*1,000,000 .*max_message_size"):
        await asyncio.wait_for(
            link.publish(bytes(2_000_000), Properties(), exchange="", keys=["q"]), PATIENCE_S
        )
    with pytest.raises(
        BrokerError, match="max_message_size"
    ):  # not a LinkLost, so nobody reconnects
        await link.lost()
    await link.close()


async def test_limits_of_a_vhost_are_named(picky):
    add_vhost(picky, "narrow")
    manage(picky, "PUT", "vhost-limits/narrow/max-queues", {"value": 0})
    link = await AmqpTransport(f"{picky.url}narrow", "test").open()
    with pytest.raises(BrokerError, match=r"queue limit in vhost 'narrow' \(0\).*set_vhost_limits"):
        await link.declare([Queue("q", "of a test")])
    await link.close()
    manage(picky, "PUT", "vhost-limits/narrow/max-connections", {"value": 0})
    with pytest.raises(BrokerError, match=r"connection limit \(0\).*set_vhost_limits"):
        await AmqpTransport(f"{picky.url}narrow", "test").open()


async def test_a_memory_alarm_blocks_publishing_until_it_clears(picky, ctl):
    link = await AmqpTransport(picky.url, "test").open()
    await link.declare([Queue("blocked", "of a test")])

    async def publish() -> None:
        await link.publish(b"x", Properties(), exchange="", keys=["blocked"])

    async def keep_publishing() -> None:  # the alarm may come after the first message
        while True:
            await publish()

    news: asyncio.Queue[RunEvent] = asyncio.Queue()
    reporting = asyncio.ensure_future(report_blocking(link, news.put_nowait))
    await asyncio.to_thread(ctl, "set_vm_memory_high_watermark", "0")
    publishing = asyncio.ensure_future(keep_publishing())
    try:
        assert await asyncio.wait_for(news.get(), PATIENCE_S) == Blocked(reason="low on memory")
        assert link.blocking.reason == "low on memory"
    finally:
        await asyncio.to_thread(ctl, "set_vm_memory_high_watermark", "0.4")
    assert await asyncio.wait_for(news.get(), PATIENCE_S) == Unblocked()
    publishing.cancel()
    await asyncio.wait_for(publish(), PATIENCE_S)
    reporting.cancel()
    await link.close()
