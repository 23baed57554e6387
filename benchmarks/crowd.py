"""Many no-op workers in one process, for ``scale``: each is a whole ``WorkerService``.

python -m benchmarks.crowd '{"url": …, "first": 1, "last": 50, "size_bytes": 1360000}'
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
    """Who is in it.

    Args:
        url: the broker.
        federation: whose workers they are.
        first: the number of the first.
        last: the number of the last.
        size_bytes: of the model.
        pause_s: from the start of one to that of the next, so that they do not all connect at once.
        heartbeat_s: seconds between signs of life.
    """

    url: str
    federation: str
    first: int
    last: int
    size_bytes: int
    pause_s: float = 0.02
    heartbeat_s: float = 10.0

    def json(self) -> str:
        """Write it for the command line."""
        return json.dumps(asdict(self))


async def attend(crowd: Crowd, number: int) -> None:
    """Be one worker until the run ends."""
    await asyncio.sleep((number - crowd.first) * crowd.pause_s)
    name = f"w{number:04d}"
    service = WorkerService(
        WorkerSettings(crowd.federation, name, "noop", heartbeat_s=crowd.heartbeat_s),
        Noop(crowd.size_bytes, number, keep=False),
        transport=AmqpTransport(crowd.url, f"benchmark worker {name}"),
        topology=Topology(crowd.federation),
        tell=lambda event: _say(name, event),
        bar=lambda *_: None,
    )
    await service.run()


def _say(name: str, event: RunEvent) -> None:
    """Write down what is out of the ordinary."""
    if isinstance(event, _TROUBLE):
        print(name, event.sentence(), flush=True)


async def attend_all(crowd: Crowd) -> None:
    """Be all of them."""
    async with asyncio.TaskGroup() as group:
        for number in range(crowd.first, crowd.last + 1):
            group.create_task(attend(crowd, number))


if __name__ == "__main__":
    run_until_signalled(attend_all(Crowd(**json.loads(sys.argv[1]))))
