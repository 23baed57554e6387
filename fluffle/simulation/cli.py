"""``fluffle simulate``: takes the coordinator's options and those of the simulated clients."""

from __future__ import annotations

import contextlib
import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import count
from fluffle_common.cli.config_file import ConfiguredCommand
from fluffle_common.cli.output_files import CHART_FILE, draw_into_files, save_chart
from fluffle_common.errors import RunError, UsageError
from fluffle_coordinator.cli.coordinator import coordinator
from fluffle_coordinator.cli.schedule_options import check_schedule_options

if TYPE_CHECKING:
    from fluffle_worker.task import Task

# Not the federation that a TOML file names, whose run a simulation must not continue.
_FEDERATION = "simulation"
# Options without a meaning in a simulation. They are accepted, so that the TOML file of a real
# coordinator can be simulated as it is.
_PASSED_OVER = (
    "federation url management dashboard queue_type verify_users wait_broker wait_workers "
    "min_workers"
).split()


class _Simulate(ConfiguredCommand):
    own_table = "simulation"


def _of_the_coordinator() -> list[click.Parameter]:
    """Return copies of the coordinator's options; those without a meaning here are hidden."""
    taken: list[click.Parameter] = []
    for option in coordinator.params:
        if not isinstance(option, click.Option) or not option.expose_value:
            continue
        ours = copy.copy(option)
        ours.hidden = ours.hidden or option.name in _PASSED_OVER
        if option.name == "federation":
            ours.required, ours.default = False, _FEDERATION
        taken.append(ours)
    return taken


@click.command(cls=_Simulate, context_settings={"show_default": True})
@click.option(
    "--task",
    required=True,
    metavar="MODULE:NAME|path.py:name",
    help="Function that creates the task, given as module:name or path.py:name. If the task can be "
    "divided, like a task from 'flax_task', its training examples are split among the "
    "clients.",
)
@click.option(
    "--data",
    default="",
    metavar="TEXT",
    help="Value that the task function gets as options.data. If the value contains '{client}' "
    "or '{clients}', each client gets its own task. The command replaces '{client}' with the "
    "client's number (from 0), and '{clients}' with the number of clients.",
)
@click.option("--clients", type=count(), default=100, help="Number of clients.")
@click.option(
    "--partition",
    default="iid",
    metavar="iid|dirichlet:A|shards:N|by:COLUMN",
    help="How to split the examples among the clients. 'iid' splits the examples at random. "
    "'dirichlet:A' gives each client different shares of the labels; a smaller A makes the shares "
    "more uneven. 'shards:N' sorts the examples by label, and gives each client N shards. "
    "'by:COLUMN' makes one client per value of the column.",
)
@click.option(
    "--plot-partition",
    type=CHART_FILE,
    metavar="FILE.png",
    help="File for a chart that shows the number of examples per label for each client. The chart "
    "is drawn before the first round.",
)
@click.option(
    "--step-time",
    default="0.01",
    metavar="SECONDS",
    help=(
        "Seconds that one training step takes on a client: a number; classes:1,2,4 (assigned to "
        "the clients in turn); lognormal:MEDIAN,SIGMA; or uniform:LOW,HIGH."
    ),
)
@click.option(
    "--fit-time",
    default="0",
    metavar="SECONDS",
    help="Seconds to add each time a client trains, on top of the time of its training steps; same "
    "format as --step-time.",
)
@click.option(
    "--bandwidth",
    metavar="BYTES/S",
    help="Speed of a client's network connection, in bytes per second; same format as "
    "--step-time.  [default: unlimited]",
    show_default=False,
)
@click.option(
    "--availability",
    default="always",
    metavar="FRACTION:SECONDS",
    help="Availability of the clients, as FRACTION:SECONDS. With 0.8:3600, each client is "
    "present 80 % of the time, and stays for an hour on average. A client that leaves "
    "loses its unfinished work.",
)
@click.option(
    "--test-every",
    type=count(),
    metavar="N",
    help="If the task is divided among the clients, test every Nth model and the last model "
    "on the task's held-out data.  [default: every model]",
    show_default=False,
)
def simulate(**options: Any) -> None:
    """Run a federation of many simulated clients in this process.

    The coordinator, the rounds, the strategies and the files are the same as in a real run. Only
    the broker and the clock differ: the broker is in memory, and time is simulated. A simulated
    hour takes only as long as this machine needs for the computation. The same seeds give the same
    run.

    \b
      fluffle simulate --task digits.py:task --clients 100 --fraction 0.1
      fluffle simulate federation.toml --partition dirichlet:0.5
      fluffle simulate --task digits.py:task --step-time classes:1,2,4

    You can use a coordinator's TOML file. Put the options that only this command has into a table
    named [simulation].
    """
    from fluffle.run_folder import committed
    from fluffle.simulation.availability import parse_availability
    from fluffle.simulation.devices import devices
    from fluffle.simulation.loop import SimulatedLoop
    from fluffle.simulation.simulate import RoundsView, clients_of, simulate_run, tested_every
    from fluffle_common.cli.console import Console
    from fluffle_common.cli.runtime import run_until_signalled
    from fluffle_coordinator.observe.times import duration
    from fluffle_coordinator.service import endings
    from fluffle_coordinator.service.app import settings_of
    from fluffle_coordinator.storage.run_store import RunStore

    check_schedule_options(options)
    number: int = options["clients"]
    availability = parse_availability(options["availability"])
    settings = settings_of({**options, "federation": _FEDERATION, "min_workers": number})
    if short := settings.needing_more(number):
        needed = max(least for _, _, least in short)
        raise UsageError(
            f"--clients {number} is too few: with these options, a round needs at least {needed} "
            f"clients; give --clients {needed}, or change --quorum, --fraction or --strategy"
        )
    here = Path.cwd()
    whole, tasks = _tasks(options)
    with contextlib.chdir(here):  # which the code of the task may have left
        if options["plot_partition"] is not None:
            _plot(whole, options)
        store = RunStore(options["folder"] or Path("runs") / settings.federation)
    done = 0 if options["fresh"] else committed(store.folder)
    settings = tested_every(settings, whole, options["test_every"] or 1, store.folder)
    owned = devices(
        number,
        step_s=options["step_time"],
        fit_s=options["fit_time"],
        bytes_per_s=options["bandwidth"],
        seed=options["seed"],
    )
    loop, began = SimulatedLoop(), time.monotonic()
    with Console(options["log_format"], {"federation": settings.federation}) as console:
        run = simulate_run(
            settings,
            clients_of(tasks, owned, availability, options["seed"]),
            store,
            RoundsView(console),
            task=options["task"],
            record=console.event,
            fresh=options["fresh"],
        )
        state = run_until_signalled(run, lambda: loop)
        if done < settings.rules.rounds:
            took_s, simulated_s = time.monotonic() - began, loop.time()
            fields = {"simulated_s": round(simulated_s, 3), "took_s": round(took_s, 3)}
            said = f"simulated {duration(simulated_s)} in {took_s:.1f} s"
            console.line("simulated", said, fields)
    if state.outcome == "stopped":
        how = endings.after_a_stop(state, store.shown)
        raise RunError(f"the run stopped: {state.reason}; {how}")


simulate.params += _of_the_coordinator()


def _tasks(options: dict[str, Any]) -> tuple[Task | None, dict[str, Task]]:
    """Return the task that was divided, or None, and the clients' tasks by name."""
    from fluffle.simulation.partition import Divisible, dealt, each_its_own, parse_partition
    from fluffle_worker.task import TaskOptions
    from fluffle_worker.task_loading import load_factory

    number, seed = options["clients"], options["seed"]
    partition = parse_partition(options["partition"])
    make = load_factory(options["task"])
    if "{" in options["data"]:
        if options["partition"] != "iid":
            raise UsageError(
                f"--partition {options['partition']} has no effect, because {{client}} in --data "
                "gives each client its own task; remove --partition, or remove {client} from --data"
            )
        return None, each_its_own(make, options["data"], number, seed)
    whole = make(TaskOptions(data=options["data"], worker="simulation", seed=seed))
    if not isinstance(whole, Divisible):
        raise UsageError(
            f"the task {options['task']} cannot be divided among clients, because it has no "
            "method part(); give each client its own data with {client} in --data, such as "
            "--data 'shard:{client}/{clients}'"
        )
    return whole, dealt(whole, partition, number, seed)


def _plot(whole: Any, options: dict[str, Any]) -> None:
    """Write a chart of the number of examples per label for each client."""
    from fluffle.simulation.plot import plot_partition

    if whole is None:
        raise UsageError(
            "--plot-partition needs a task that is divided among the clients, but {client} in "
            "--data gives each client its own task; remove --plot-partition"
        )
    asked = {name: options[name] for name in ("clients", "partition", "seed")}
    draw_into_files()
    save_chart(plot_partition(whole, **asked), options["plot_partition"], "--plot-partition")
