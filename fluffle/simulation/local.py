"""``fluffle.simulate``: a federation of simulated clients, from Python."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluffle.background import Background, short_traceback
from fluffle.federation import Tasks, by_name, make_task
from fluffle.keywords import as_keywords, settings_from
from fluffle.progress import Progress
from fluffle.results import Run
from fluffle.run_folder import RunFolder
from fluffle.simulation.availability import parse_availability
from fluffle.simulation.devices import Device, devices
from fluffle.simulation.loop import SimulatedLoop
from fluffle.simulation.partition import Divisible, Partition, check_whole, dealt, parse_partition
from fluffle.simulation.simulate import clients_of, simulate_run, tested_every
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo
from fluffle_common.errors import UsageError
from fluffle_common.protocol.events import RunEvent, Traceback
from fluffle_coordinator.machine.state import State
from fluffle_worker.task import Task

if TYPE_CHECKING:
    from fluffle_coordinator.strategy.base import Strategy
    from fluffle_coordinator.user_code.hooks import Evaluate, OnRound

_CALLER = "fluffle.simulate"
_CLIENTS = 100


@short_traceback
@as_keywords()
def simulate(
    tasks: Task | Tasks,
    *,
    clients: int | None = None,
    partition: str | Partition | None = None,
    rounds: int | None = None,
    fraction: float | None = None,
    strategy: str | Strategy[Any] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    step_s: float | str = 0.01,
    fit_s: float | str = 0,
    bytes_per_s: float | str | None = None,
    owned: Iterable[Device] | None = None,
    availability: str = "always",
    test_every: int = 1,
    evaluate: Evaluate | str | None = None,
    on_round: OnRound | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Run:
    """Run a federation of simulated clients, in simulated time.

    The coordinator is that of ``fluffle.run`` and ``fluffle coordinator``; only the broker is in
    memory, and time advances whenever nothing is left to compute. The same seeds give the same run.

    Args:
        tasks: one task per client, in a list or by name, where a function without arguments that
            makes a task can take a task's place; or one task that can be divided, such as a
            ``flax_task``, whose training examples are split among the clients.
        clients: the number of clients that a task is divided among; 100 by default.
        partition: how to split it: ``iid`` (the default), ``dirichlet:0.5``, ``shards:2``,
            ``by:COLUMN``, or an object.
        rounds: the number of rounds.
        fraction: the fraction of the clients to select in each round.
        strategy: how updates become the next model: a name, ``path.py:name`` or an object.
        epochs: local epochs per round.
        batch_size: the local batch size.
        learning_rate: the local learning rate; None means the task's own.
        seed: the seed of every random choice, including the partition and the devices.
        step_s: the duration of one training step on a client, in seconds: a number, or a
            distribution such as ``classes:1,2,4`` or ``lognormal:1,0.5``.
        fit_s: a fixed time that is added to each training, in seconds, in the form of ``step_s``.
        bytes_per_s: the bandwidth of a client's connection, in the form of ``step_s``; None means
            unlimited.
        owned: the clients' devices, instead of the three arguments above.
        availability: ``always`` or ``FRACTION:SECONDS``. With ``0.8:3600``, a client is present
            80 % of the time, for an hour at a stretch on average; when it leaves, its unfinished
            work is lost.
        test_every: evaluate every so many rounds' model, and the last one, on the held-out data of
            a divided task.
        evaluate: another test, ``evaluate(weights) -> metrics``, of every round's model.
        on_round: called with each ``Commit``; ends the run if it returns a reason or raises
            ``StopRun``.
        folder: the run folder; an earlier run in it is continued. None means a temporary folder,
            deleted once nothing refers to the returned object or its rounds.
        progress: whether to show progress; None shows it on a terminal and in a notebook.
        **options: any other option of ``fluffle coordinator``, with underscores.

    Returns:
        The run; its times are simulated.

    Raises:
        UsageError: if an argument is invalid.
        TaskError: if a round waits only for clients whose tasks failed twice.
        RunError: if the run stopped before its end.
    """
    _check(options, clients=clients, test_every=test_every)
    check_whole(f"{_CALLER}(): seed", seed, 0)
    run_folder, here = RunFolder(folder), Path.cwd()
    whole, named = _tasks(tasks, clients, partition, seed)
    with contextlib.chdir(here):  # which the code of a task may have left
        settings, values = settings_from(
            _CALLER,
            {
                "rounds": rounds,
                "fraction": fraction,
                "epochs": epochs,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "seed": seed,
                "federation": "simulation",
                **options,
            },
            workers=len(named),
            strategy=strategy,
            evaluate=evaluate,
            on_round=on_round,
        )
    drawn = devices(len(named), step_s=step_s, fit_s=fit_s, bytes_per_s=bytes_per_s, seed=seed)
    presence = parse_availability(str(availability))
    everybody = clients_of(named, drawn if owned is None else _devices(owned), presence, seed)

    def body(run_coroutine: Callable[[Coroutine[Any, Any, State]], State]) -> Run:
        fresh = values["fresh"]
        with run_folder, Progress(progress, settings.rules.rounds) as shown:
            tested = tested_every(settings, whole, test_every, run_folder.store.folder)
            simulation = simulate_run(
                tested, everybody, run_folder.store, shown, record=_show, fresh=fresh
            )
            return run_folder.result(run_coroutine(simulation))

    return Background(body, SimulatedLoop).wait()


def _show(event: RunEvent) -> None:
    """Write an event about a task's fault to stderr; a traceback as it is."""
    if isinstance(event, Traceback):
        echo(*event.sentence().splitlines(), err=True)
    else:
        warn(event.sentence())


def _check(options: Mapping[str, Any], **counts: int | None) -> None:
    """Refuse a broker, and counts below 1."""
    if options.get("url"):
        raise UsageError(
            f"{_CALLER}() has no url=, because its broker is in memory; use fluffle.run(url=…) "
            "for a real broker"
        )
    for name, number in counts.items():
        if number is not None:
            check_whole(f"{_CALLER}(): {name}", number, 1)


def _devices(owned: Iterable[Device]) -> list[Device]:
    """Return the devices in a list."""
    given = list(owned) if isinstance(owned, Iterable) else []
    if not given or not all(isinstance(one, Device) for one in given):
        raise UsageError(
            f"{_CALLER}(): owned= expects a list with one Device for each client, not {owned!r:.60}"
        )
    return given


def _tasks(
    tasks: Task | Tasks,
    clients: int | None,
    partition: str | Partition | None,
    seed: int,
) -> tuple[Task | None, dict[str, Task]]:
    """Return the task that is divided, or None, and the clients' tasks by name."""
    if isinstance(tasks, Iterable):
        named = by_name(tasks, "client")
        given = {name: make_task(name, task) for name, task in named.items()}
    elif isinstance(tasks, Divisible):
        rule = parse_partition("iid" if partition is None else partition)
        return tasks, dealt(tasks, rule, clients or _CLIENTS, seed)
    else:
        raise UsageError(
            f"{_CALLER}(): a {type(tasks).__name__} cannot be divided among clients, because it "
            "has no method part(); give a list of tasks, one for each client"
        )
    if partition is not None:
        raise UsageError(
            f"{_CALLER}(): partition={partition!r} has no effect on a list of tasks, because each "
            "task is one client; remove partition=, or give one task with all the data"
        )
    if clients not in {None, len(given)}:
        raise UsageError(
            f"{_CALLER}(): clients = {clients}, but the number of tasks is {len(given)}; give "
            "one task for each client, or remove clients="
        )
    if not given:
        raise UsageError(f"{_CALLER}() needs tasks; give one task for each client")
    return None, given
