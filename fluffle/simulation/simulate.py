"""A simulated run: the coordinator that is deployed, a broker in memory, and a fleet of clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
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
from fluffle_coordinator.service.hooks import Evaluate
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_worker.task import EvalResult, Task

# A client says something when there is something to say: silence is no sign of anything.
_NEVER = 10**9


async def simulate_run(
    settings: CoordinatorSettings,
    clients: Sequence[Client],
    store: RunStore,
    watcher: Watcher,
    *,
    task: str = "simulation",
    say: Callable[[str], object] = lambda _: None,
    fresh: bool = False,
) -> State:
    """Run a federation of these clients to its end; on a ``SimulatedLoop``, in its time.

    Args:
        settings: as for any coordinator.
        clients: who takes part.
        store: the run's folder, locked; a run that is there goes on.
        watcher: told what happens.
        task: what the run's files call the task.
        say: told, once each, what a task returns that is not fit for use.
        fresh: move an earlier run aside.

    Raises:
        RunError: where nothing is due any more, and the run has not ended.
        TaskError: where a client is refused.
    """
    never = float("inf")
    present = sum(client.present for client in clients)  # the first round is for all of these
    rules = replace(
        settings.rules,
        min_workers=max(1, min(settings.rules.min_workers, present)),
        patience=_NEVER,
        hearing_s=never,
        stall_s=never,
    )
    if rules.samples:  # a fraction is of those present, not of all clients
        rules = replace(rules, least=min(rules.least, rules.sample_of(present)))
    settings = replace(
        settings,
        rules=rules,
        max_workers=max(settings.max_workers, len(clients)),
        waiting_every_s=never,
    )
    broker, topology = MemoryBroker(), Topology(settings.federation)
    fleet = Fleet(
        list(clients),
        federation=settings.federation,
        topology=topology,
        transport=broker,
        task=task,
        say=say,
    )
    journal = JournalFile(store.folder, settings.federation)
    told = Watchers(watcher, journal)
    run = asyncio.ensure_future(
        coordinate(settings, broker, topology, store, told, journal=None, fresh=fresh)
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


def clients_of(
    tasks: Mapping[str, Task],
    owned: Sequence[Device] | None = None,
    availability: Availability = ALWAYS,
    seed: int = 0,
) -> list[Client]:
    """Return a client for each task, by name.

    Args:
        tasks: by the names of the clients.
        owned: a device for each; None: nothing takes any time.
        availability: when each of them is present.
        seed: of their comings and goings.

    Raises:
        UsageError: if there are more or fewer devices than tasks.
    """
    devices = [Device()] * len(tasks) if owned is None else owned
    if len(devices) != len(tasks):
        raise UsageError(
            f"there are {len(devices)} devices for {len(tasks)} clients; give each one"
        )
    made = []
    for number, ((name, task), device) in enumerate(zip(tasks.items(), devices, strict=True)):
        rng = np.random.default_rng([seed, number])
        present = availability.begin(rng)
        made.append(Client(name, task, device, availability, rng, present=present))
    return made


def tested_every(
    settings: CoordinatorSettings, whole: Task | None, every: int, done: int
) -> CoordinatorSettings:
    """Return the settings with a test on what a divided task holds out, unless there is another.

    Args:
        settings: the run's.
        whole: the task that was divided among the clients; None if they have tasks of their own.
        every: how many rounds lie between two tests; the last round is tested too.
        done: how many rounds there are already.
    """
    if settings.hooks.evaluate is not None or whole is None:
        return settings
    test = _evaluated_every(whole, every, done, settings.rules.rounds)
    return replace(settings, hooks=replace(settings.hooks, evaluate=test))


def _evaluated_every(task: Task, every: int, begin: int, last: int) -> Evaluate:
    """Return a hook that evaluates every so many rounds' model on what a task holds out.

    Args:
        task: the task.
        every: how many rounds lie between two tests.
        begin: how many rounds there are already.
        last: the round whose model is evaluated in any case.
    """
    number = begin

    def evaluate(weights: Weights) -> Mapping[str, float]:
        nonlocal number
        number += 1
        if number % every and number != last:
            return {}
        found: EvalResult | None = task.evaluate(weights)
        return {} if found is None else {"loss": found.loss, **found.metrics}

    return evaluate
