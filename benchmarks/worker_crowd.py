"""Many no-op workers in one process, each a complete ``WorkerService``; used by ``scale``.

python -m benchmarks.worker_crowd '{"url": …, "first": 1, "last": 50, "size_bytes": 1360000}'
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass

from benchmarks.noop import Noop
from fluffle_common.cli.runtime import run_until_signalled
from fluffle_common.protocol.events import (
    Disconnected,
    Failure,
    NoBroker,
    Occupied,
    Rejected,
    RunEvent,
    Unsent,
)
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from fluffle_worker.service import WorkerService
from fluffle_worker.settings import WorkerSettings

_TROUBLE = (Disconnected, Failure, NoBroker, Occupied, Rejected, Unsent)


@dataclass(frozen=True)
class Crowd:
    """The workers of one process.

    Args:
        url: the address of the broker.
        federation: the name of the federation.
        first: the number of the first worker.
        last: the number of the last worker.
        size_bytes: the size of the model.
        pause_s: seconds between the starts of two workers, so that they connect one by one.
        heartbeat_s: seconds between heartbeats.
    """

    url: str
    federation: str
    first: int
    last: int
    size_bytes: int
    pause_s: float = 0.02
    heartbeat_s: float = 10.0

    def json(self) -> str:
        """Return the crowd as JSON for the command line."""
        return json.dumps(asdict(self))


async def run_worker(crowd: Crowd, number: int) -> None:
    """Run one worker until the run ends."""
    await asyncio.sleep((number - crowd.first) * crowd.pause_s)
    name = f"w{number:04d}"
    service = WorkerService(
        WorkerSettings(crowd.federation, name, "noop", heartbeat_s=crowd.heartbeat_s),
        Noop(crowd.size_bytes, number, keep=False),
        transport=AmqpTransport(crowd.url, f"benchmark worker {name}"),
        topology=Topology(crowd.federation),
        record=lambda event: _print_trouble(name, event),
        bar=lambda *_: None,
    )
    await service.run()


def _print_trouble(name: str, event: RunEvent) -> None:
    if isinstance(event, _TROUBLE):
        print(name, event.sentence(), flush=True)


async def run_workers(crowd: Crowd) -> None:
    """Run all workers until the run ends."""
    async with asyncio.TaskGroup() as group:
        for number in range(crowd.first, crowd.last + 1):
            group.create_task(run_worker(crowd, number))


if __name__ == "__main__":
    run_until_signalled(run_workers(Crowd(**json.loads(sys.argv[1]))))
