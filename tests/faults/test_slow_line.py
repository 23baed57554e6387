"""A worker behind a slow line keeps its heartbeats, and its updates arrive however slowly."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fluffle_broker.node import node
from fluffle_common.protocol import wire_format as wire
from fluffle_common.protocol.messages import Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Properties
from fluffle_common.transport.messaging import Route, send_tensors
from fluffle_common.transport.rabbitmq import confirms as amqp_confirms
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from tests.faults.harness import Federation
from tests.faults.proxy import Proxy

pytestmark = pytest.mark.rabbit


def slow_url(broker_node: node.NodeInfo, proxy: Proxy) -> str:
    return broker_node.url.replace(f":{broker_node.ports.amqp}", f":{proxy.port}")


def test_a_worker_behind_a_slow_line_counts(
    federation: Federation, broker_node: node.NodeInfo
) -> None:
    """Its upload takes 4 s, and it would be gone after 3 s without a heartbeat."""
    kernel = {"FAULTS_KERNEL": str(16 * 1024)}  # 65 kB
    coordinator = federation.coordinator("--min-workers", 3, "--rounds", 1)
    with Proxy(broker_node.ports.amqp, rate=16_000) as proxy:
        fast = [federation.worker(n, 3, "--heartbeat", 0.6, **kernel) for n in (1, 2)]
        federation.url = slow_url(broker_node, proxy)
        slow = federation.worker(0, 3, "--heartbeat", 0.6, **kernel)
        assert [program.end() for program in (coordinator, slow, *fast)] == [0] * 4
    assert coordinator.events("gone") == []
    (line,) = federation.history("committed")
    assert sorted(one["worker"] for one in line["participants"]) == ["w0", "w1", "w2"]


async def test_a_slow_upload_succeeds_and_does_not_delay_heartbeats(
    broker_node: node.NodeInfo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An upload of 8 s succeeds with a timeout of 3 s, because its bytes keep moving."""
    monkeypatch.setattr(amqp_confirms, "_CONFIRM_S", 3.0)
    monkeypatch.setattr(wire, "PART_BYTES", 2**16)
    names = Topology(f"t{uuid.uuid4().hex[:8]}")
    with Proxy(broker_node.ports.amqp, rate=50_000) as proxy:
        link = await AmqpTransport(slow_url(broker_node, proxy), "slow line test").open()
        await link.declare([*names.shared(), *names.of_worker("w")])
        update = Update(
            federation=names.federation, run="r", round=1, base="b", worker="w", num_examples=1,
            seconds=0.0,
        )  # fmt: skip
        to_updates = Route(names.results, ["update.w"])
        upload = asyncio.create_task(
            send_tensors(
                link,
                update,
                {"w": np.zeros(100_000, np.float32)},
                to_updates,
                parts=replace(to_updates, keys=["part.w"]),
            )
        )
        beats = 0  # confirmed while the upload goes on
        while not upload.done():
            await link.publish(
                b"x", Properties(), exchange=names.results, keys=["heartbeat.w"], urgent=True
            )
            beats += not upload.done()
            await asyncio.wait([upload], timeout=0.1)
        await upload
        assert beats > 2
        counts = await link.counts(names.outbox("w"))
        assert counts is not None
        assert counts.ready == 7
        # A slow download is no silence either.
        for _ in range(counts.ready):
            assert await link.get(names.outbox("w")) is not None
        await link.close()
