"""A simulated run: the real coordinator, a broker in memory, and a fleet of clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fluffle.simulation.availability import ALWAYS, Availability
from fluffle.simulation.devices import Device
from fluffle.simulation.fleet import Client, Fleet
from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.memory import MemoryBroker
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.observe.journal_file import JournalFile
from fluffle_coordinator.observe.watchers import Watcher, Watchers
from fluffle_coordinator.service.app import coordinate
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_worker.inbox import Record
from fluffle_worker.task import Task

# Number of missed heartbeats after which a client counts as gone: idle clients send none.
_NEVER = 10**9


async def simulate_run(
    settings: CoordinatorSettings,
    clients: Sequence[Client],
    store: RunStore,
    watcher: Watcher,
    *,
    task: str = "simulation",
    record: Record = lambda _: None,
    fresh: bool = False,
) -> State:
    """Run a federation of simulated clients to its end, in the time of a ``SimulatedLoop``.

    An earlier run in the folder is continued unless ``fresh``. See ``Fleet`` for ``task`` and
    ``record``.

    Raises:
        RunError: if no further event is due although the run has not ended.
        TaskError: if the coordinator refuses a client.
    """
    settings = _for_clients(settings, clients)
    broker, topology = MemoryBroker(), Topology(settings.federation)
    fleet = Fleet(clients, topology=topology, transport=broker, task=task, record=record)
    journal = JournalFile(store.folder, settings.federation)
    watchers = Watchers(watcher, journal)
    run = asyncio.ensure_future(
        coordinate(settings, broker, topology, store, watchers, journaled=False, fresh=fresh)
    )
    taking_part = asyncio.ensure_future(fleet.run())
    try:
        await asyncio.wait({run, taking_part}, return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            taking_part.result()
            raise RunError("the clients have left the simulation")
        return run.result()
    finally:
        for one in (run, taking_part):
            one.cancel()
        await asyncio.gather(run, taking_part, return_exceptions=True)
        with contextlib.suppress(OSError):  # the run is over, and its files are whole
            journal.write()


def _for_clients(settings: CoordinatorSettings, clients: Sequence[Client]) -> CoordinatorSettings:
    """Return the settings of a run whose clients are heard only when they have something to say."""
    never = float("inf")
    present = sum(client.present for client in clients)  # the first round waits for all of these
    rules = replace(
        settings.rules,
        min_workers=max(1, min(settings.rules.min_workers, present)),
        patience=_NEVER,
        hearing_s=never,
        stall_s=never,
    )
    if rules.samples:  # a fraction is of those present, not of all clients
        rules = replace(rules, least=min(rules.least, rules.sample_of(present)))
    return replace(
        settings,
        rules=rules,
        max_workers=max(settings.max_workers, len(clients)),
        waiting_every_s=never,
    )


def clients_of(
    tasks: Mapping[str, Task],
    owned: Sequence[Device] | None = None,
    availability: Availability = ALWAYS,
    seed: int = 0,
) -> list[Client]:
    """Return a client for each task, by name.

    ``owned`` has a device for each client; None means that nothing takes any time. ``seed`` is that
    of the times present and away.

    Raises:
        UsageError: if the numbers of devices and tasks differ.
    """
    devices = [Device()] * len(tasks) if owned is None else owned
    if len(devices) != len(tasks):
        raise UsageError(
            f"there are {len(devices)} devices for {len(tasks)} clients; give one device for "
            "each client"
        )
    made = []
    for number, ((name, task), device) in enumerate(zip(tasks.items(), devices, strict=True)):
        rng = np.random.default_rng([seed, number])
        present = availability.begin(rng)
        made.append(Client(name, task, device, availability, rng, present))
    return made


def tested_every(
    settings: CoordinatorSettings, whole: Task | None, every: int, done: int
) -> CoordinatorSettings:
    """Return settings that test models on the held-out data of the task that was divided.

    They test every so many rounds' model, and the last one; ``done`` rounds are already committed.
    They are unchanged if they already have an ``evaluate`` hook, or no task was divided.
    """
    if settings.hooks.evaluate is not None or whole is None:
        return settings
    number = done

    def evaluate(weights: Weights) -> Mapping[str, float]:
        nonlocal number
        number += 1
        if number % every and number != settings.rules.rounds:
            return {}
        found = whole.evaluate(weights)
        return {} if found is None else {"loss": found.loss, **found.metrics}

    return replace(settings, hooks=replace(settings.hooks, evaluate=evaluate))
