"""A simulated run: the real coordinator, an in-memory broker, and a fleet of clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fluffle.run_folder import committed
from fluffle.simulation.availability import ALWAYS, Availability
from fluffle.simulation.devices import Device
from fluffle.simulation.fleet import Client, Fleet
from fluffle_common.cli.console import warn
from fluffle_common.errors import RunError, TaskError, UsageError
from fluffle_common.protocol import events
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.metric_names import TEST_PREFIX
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.weights import Weights
from fluffle_common.transport.memory import MemoryBroker
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.observe.journal_file import JournalFile
from fluffle_coordinator.observe.watchers import View, Watcher, Watchers
from fluffle_coordinator.service.app import coordinate
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_worker.inbox import Record
from fluffle_worker.local.persistent_tensors import keep_in
from fluffle_worker.results import Results
from fluffle_worker.task import Task

# Number of missed heartbeats after which a client counts as gone: idle clients send none.
_NEVER = 10**9
# The console shows none of these: a simulation can have thousands of clients.
_OF_A_CLIENT = (
    events.Connected,
    events.Counted,
    events.Joined,
    events.Opened,
    events.Quorum,
    events.Waiting,
)
_FEW = 10  # participants of a round, at most, that the console lists by name


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
        TaskError: if the coordinator refuses a client, or a round lacks only clients that failed
            again after it was reopened.
    """
    for client in clients:
        keep_in(store.folder / "workers" / client.name, task, client.task)
    settings = _for_clients(settings, clients)
    broker, topology = MemoryBroker(), Topology(settings.federation)
    fleet = Fleet(clients, topology=topology, transport=broker, task=task, record=record)
    journal = JournalFile(store.folder, settings.federation)
    failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watchers = Watchers(watcher, journal, _FailureWatcher(clients, failure))
    run = asyncio.ensure_future(
        coordinate(settings, broker, topology, store, watchers, journaled=False, fresh=fresh)
    )
    taking_part = asyncio.ensure_future(fleet.run())
    try:
        futures: set[asyncio.Future[Any]] = {run, taking_part, failure}
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            for ended in (one for one in (failure, taking_part) if one.done()):
                ended.result()
            raise RunError("the run cannot continue, because all clients have left the simulation")
        return run.result()
    finally:
        for one in (run, taking_part, failure):
            one.cancel()
        await asyncio.gather(run, taking_part, failure, return_exceptions=True)
        with contextlib.suppress(OSError):  # the run is over, and its files are whole
            journal.write()


class RoundsView(View):
    """The console output of a simulation: its rounds, but not every client's events."""

    def record(self, event: RunEvent) -> None:
        """See ``Watcher``; a commit with many participants does not list them."""
        if isinstance(event, events.Committed) and len(event.participants or ()) > _FEW:
            count = len(event.participants or ())
            event = events.Note(what=f"round {event.round}: committed with {count} updates")
        if not isinstance(event, _OF_A_CLIENT):
            super().record(event)


class _FailureWatcher(Watcher):
    """Ends a simulation whose open round can only wait for clients that failed again.

    A failed client is asked again when the round is reopened, since its error may pass. If it fails
    again, and everybody is present and has answered or failed, further attempts are in vain.
    """

    def __init__(self, clients: Sequence[Client], failure: asyncio.Future[None]) -> None:
        self._clients, self._failure = clients, failure

    def show(self, state: State, now: float) -> None:
        """Set an exception if the round is in vain."""
        if not state.reopenings or self._failure.done():
            return
        rejected = {name: f"its update was rejected ({why})" for name, why in state.doubted.items()}
        faults, missing = {**state.failed, **rejected}, state.missing
        in_vain = bool(missing) and all(name in faults for name in missing)
        if in_vain and all(client.present for client in self._clients):
            what = f"failed again in round {state.round}: {faults[missing[0]]}"
            self._failure.set_exception(TaskError(f"the task '{missing[0]}' {what}"))


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
        stall_without_steps_s=never,
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
    settings: CoordinatorSettings, whole: Task | None, every: int, folder: Path
) -> CoordinatorSettings:
    """Return settings that test models on the held-out data of the task that was divided.

    They test every so many rounds' model, and the last one, of the run in ``folder``. The loss that
    may end the run early is that of the test. The settings are unchanged if they already have an
    ``evaluate`` hook, or no task was divided.
    """
    if settings.hooks.evaluate is not None or whole is None:
        return settings
    number, results = 0, Results(warn)

    def evaluate(weights: Weights) -> Mapping[str, float]:
        nonlocal number
        # Read now, because the coordinator may have gone back to an earlier round first.
        number = number + 1 if number else committed(folder)
        if number % every and number != settings.rules.rounds:
            return {}
        returned = whole.evaluate(weights)  # a failure is one of the hook
        found = results.evaluated(lambda: returned)
        return {"loss": found.loss, **found.metrics} if found and found.num_examples else {}

    evaluate.__qualname__ = "the task's evaluate"  # its name in run.json and in the report
    stopping = settings.stopping
    if stopping.monitor is None and (stopping.target, stopping.patience) != (None, None):
        stopping = replace(stopping, monitor=f"{TEST_PREFIX}loss")
    hooks = replace(settings.hooks, evaluate=evaluate)
    return replace(settings, hooks=hooks, stopping=stopping)
