"""A simulated run: the coordinator that is deployed, a broker in memory, and a fleet of clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

from fluffle.simulation.fleet import Client, Fleet
from fluffle.simulation.loop import SimulatedLoop
from fluffle_common.errors import RunError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.memory import MemoryBroker
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.observe.watchers import Watcher
from fluffle_coordinator.service.coordinator import Coordinator
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore

# A client says something when there is something to say: silence is no sign of anything.
_NEVER = 10**9


@dataclass(frozen=True)
class Simulated:
    """What came of a simulated run.

    Args:
        state: where it ended.
        simulated_s: how long it would have taken.
    """

    state: State
    simulated_s: float


def simulate(
    settings: CoordinatorSettings,
    clients: list[Client],
    store: RunStore,
    watcher: Watcher,
    *,
    task: str = "simulation",
) -> Simulated:
    """Run a federation of these clients to its end, in simulated time; blocks.

    Args:
        settings: as for any coordinator.
        clients: who takes part.
        store: the run's folder, locked; a run that is there goes on.
        watcher: told what happens.
        task: what the run's files call the task.

    Raises:
        RunError: where nothing is due any more, and the run has not ended.
        TaskError: where a client is refused.
    """
    rules = replace(settings.rules, patience=_NEVER, hearing_s=float("inf"))
    settings = replace(settings, rules=rules, max_workers=max(settings.max_workers, len(clients)))
    broker, topology = MemoryBroker(), Topology(settings.federation)
    loop = SimulatedLoop()

    async def run() -> State:
        fleet = Fleet(
            clients,
            federation=settings.federation,
            topology=topology,
            transport=broker,
            task=task,
        )
        coordinator = Coordinator(
            settings,
            transport=broker,
            topology=topology,
            store=store,
            saved=store.load(settings.federation),
            watcher=watcher,
        )
        return await _beside(fleet.run(), coordinator.run())

    with _running(loop):
        return Simulated(loop.run_until_complete(run()), loop.time())


async def _beside(fleet: Coroutine[Any, Any, None], run: Coroutine[Any, Any, State]) -> State:
    """Return what the run returns; a fleet that fails ends it."""
    running, taking_part = asyncio.ensure_future(run), asyncio.ensure_future(fleet)
    try:
        await asyncio.wait({running, taking_part}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            taking_part.result()
            raise RunError("the clients have left")
        return running.result()
    finally:
        for one in (running, taking_part):
            one.cancel()
        await asyncio.gather(running, taking_part, return_exceptions=True)


@contextlib.contextmanager
def _running(loop: SimulatedLoop) -> Any:
    asyncio.set_event_loop(loop)
    try:
        yield
    finally:
        for left in asyncio.all_tasks(loop):
            left.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()
