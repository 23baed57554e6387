"""Repairs a federation's exchanges and bindings if somebody deletes them during a run.

The broker reports the deletion of a queue to its consumers, but not that of an exchange or a
binding: results would silently miss their queue.
"""

from __future__ import annotations

import asyncio
import contextlib

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.protocol.topology import Binding, Topology
from fluffle_common.transport.base import Link

_EVERY_S = 10.0


async def keep_bound(link: Link, topology: Topology, *, journaled: bool) -> None:
    """Bind the shared queues again from time to time, unless the permission for it was taken away.

    Raises:
        LinkLost: if an exchange or a queue is missing; the next link declares it.
    """
    bindings = [entity for entity in topology.shared() if isinstance(entity, Binding)]
    while True:
        await asyncio.sleep(_EVERY_S)
        with contextlib.suppress(BrokerError):
            whole = await link.bind(bindings) and await link.exists(topology.work)
            if not whole or (journaled and await link.counts(topology.journal) is None):
                raise LinkLost(f"an exchange or queue of federation {topology.federation} is gone")
