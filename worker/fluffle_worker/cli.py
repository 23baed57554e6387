"""The command ``fluffle worker``."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import SEED, federation_option, queue_type_option, seconds, url_option
from fluffle_common.cli.config_file import ConfiguredCommand
from fluffle_common.cli.console import log_format_option
from fluffle_common.errors import UsageError

if TYPE_CHECKING:
    from fluffle_common.cli.console import Console
    from fluffle_worker.service import WorkerService
    from fluffle_worker.task import Task


@click.command(cls=ConfiguredCommand, context_settings={"show_default": True})
@federation_option
@url_option
@click.option(
    "--data",
    required=True,
    metavar="DIR",
    help="This worker's data; with --task, your function receives this value as options.data. For "
    "the letters task: a folder of images, laid out as <class>/<image>.",
)
@click.option(
    "--task",
    default="fluffle_worker.letters.task:task",
    metavar="NAME",
    help="Function that creates the training task, given as module:name or path.py:name.",
)
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    metavar="PATH.PY:NAME",
    help="Codec to load from your own file, given as path.py:name. The coordinator's --compress "
    "can then name this codec. For several codecs, repeat the option. Installed codecs are found "
    "without this option.",
)
@click.option(
    "--local-rule",
    metavar="NAME",
    help=(
        "Rule that changes each gradient during training: proximal:MU (FedProx); clip:NORM "
        "(gradient clipping); dp_sgd:CLIP,NOISE (DP-SGD); scaffold (SCAFFOLD); path.py:name (your "
        "own rule); or several rules joined by + (docs/tasks.md).  "
        "[default: none]"
    ),
    show_default=False,
)
@click.option(
    "--id",
    "worker_id",
    metavar="NAME",
    help="ID of this worker, unique in the federation.  [default: derived from --data]",
    show_default=False,
)
@click.option(
    "--classes",
    metavar="A,B,…",
    help="Names of all classes in the federation; required if this worker's data lacks a "
    "class.  [default: the classes in the data]",
    show_default=False,
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    help="Seed for splitting the data into training and held-out examples.",
)
@click.option(
    "--heartbeat",
    type=seconds(0, 60, min_open=True),
    default=2.0,
    help="Seconds between heartbeats.",
)
@click.option(
    "--wait-id",
    type=seconds(),
    default=75.0,
    help="Seconds to wait if a worker with the same ID is still connected. After a crash of the "
    "machine, the broker may keep the worker's own old connection open for a minute.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for the data that this worker keeps between rounds: the state of its local rule, "
    "its personal tensors, and the frozen tensors that it received. Each worker needs its own "
    "folder.  [default: runs/workers/FEDERATION/ID]",
    show_default=False,
)
@click.option(
    "--stay", is_flag=True, help="Wait for the next run when a run has ended, instead of exiting."
)
@click.option(
    "--wait-broker",
    type=seconds(min_open=True),
    default=600.0,
    help="Time limit in seconds for reaching the broker.",
)
@queue_type_option
@log_format_option
def worker(**options: Any) -> None:
    """Take part in a federation with your own data.

    The data never leaves this machine. The worker sends only weight changes, metrics, and facts
    such as its number of examples and its class names. You can start the worker before or after
    the broker and the coordinator. It waits for them, joins the open round or the next round, and
    reconnects after any outage.

    \b
      fluffle worker --federation letters --data data/client-1
      fluffle worker --federation digits --task digits.py:task --data shard:0/3
      fluffle worker worker.toml --id hospital-7

    You can also set every option in a TOML file, as a key with the same name. An option on the
    command line overrides the same key in the TOML file.
    """
    from fluffle_common.cli.settings import check_federation, check_worker

    federation = check_federation(options["federation"])
    name = options["worker_id"] or id_from(options["data"])
    if not name:
        raise UsageError(f"no worker ID can be derived from --data '{options['data']}'; add --id")
    _run(federation, check_worker(name), options)


def id_from(data: str) -> str:
    """Derive a worker's id from ``--data``: the last part of a path, or any other text, cleaned.

    The id is empty if nothing is left of the text.

    Example:
        >>> id_from("data/client-1/"), id_from("shard:0/3")
        ('client-1', 'shard-0-3')
    """
    text = data if ":" in data else Path(data).resolve().name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")[:64]


def _run(federation: str, name: str, options: dict[str, Any]) -> None:
    from fluffle_common.cli.console import Console
    from fluffle_common.cli.exit_now import exit_now
    from fluffle_common.cli.loading import load_codec
    from fluffle_common.cli.settings import broker_url_finder
    from fluffle_common.protocol.events import Loaded
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport
    from fluffle_common.transport.reconnect import Backoff
    from fluffle_worker.local.persistent_tensors import claim
    from fluffle_worker.service import WorkerService
    from fluffle_worker.settings import WorkerSettings
    from fluffle_worker.signature import signature_of_task
    from fluffle_worker.task import classes_of, num_examples_of

    transport = AmqpTransport(
        broker_url_finder(options["url"]), f"fluffle worker {name} of {federation}"
    )
    # The code of the task may change the current folder.
    state_dir = (options["state_dir"] or Path("runs/workers", federation, name)).absolute()
    if options["state_dir"]:
        claim(state_dir, f"{federation}/{name}")
    for codec in options["codecs"]:
        load_codec(codec, "--codec")
    task = _task(name, options)
    signature = signature_of_task(task)
    settings = WorkerSettings(
        federation=federation,
        worker=name,
        task=options["task"],
        heartbeat_s=options["heartbeat"],
        occupied_s=options["wait_id"],
        state_dir=state_dir,
        stay=options["stay"],
        backoff=Backoff(give_up_s=options["wait_broker"]),
    )
    with Console(options["log_format"], {"federation": federation, "worker": name}) as console:

        def make_service() -> WorkerService:
            return WorkerService(
                settings,
                task,
                transport=transport,
                topology=Topology(federation, options["queue_type"]),
                record=console.event,
                bar=console.bar,
                signature=signature,
            )

        console.event(
            Loaded(
                task=settings.task,
                num_examples=num_examples_of(task),
                classes=classes_of(task) or None,
            )
        )
        code, at_work = _run_to_end(make_service, console)
    if at_work:
        exit_now(code)
    sys.exit(code)


def _task(worker: str, options: dict[str, Any]) -> Task:
    """Load the task and apply the options for classes and the local rule."""
    from fluffle_common.cli.settings import parse_classes
    from fluffle_worker.local.loading import use_local_rule
    from fluffle_worker.task import TaskOptions
    from fluffle_worker.task_loading import load_factory

    here = Path.cwd()
    given = TaskOptions(
        data=options["data"],
        worker=worker,
        seed=options["seed"],
        classes=parse_classes(options["classes"]),  # checked before the task's code runs
    )
    task = load_factory(options["task"])(given)
    if options["local_rule"]:
        with contextlib.chdir(here):  # which the code of the task may have left
            use_local_rule(task, options["local_rule"])
    return task


def _run_to_end(make_service: Callable[[], WorkerService], console: Console) -> tuple[int, bool]:
    """Run a worker; return the exit code, and whether the task's code may still be running."""
    from fluffle_common.cli.console import warn
    from fluffle_common.cli.exit_now import Interrupted
    from fluffle_common.cli.runtime import run_until_signalled
    from fluffle_common.errors import FluffleError
    from fluffle_common.protocol.events import Leaving

    running: WorkerService | None = None
    code = 0

    async def run() -> None:
        nonlocal running
        running = make_service()  # needs a running event loop
        await running.run()
        if (error := running.verdict()) is not None:
            raise error

    try:
        run_until_signalled(run())
    except Interrupted as signalled:
        console.event(Leaving())
        code = signalled.exit_code
    except FluffleError as why:
        warn(str(why))
        code = why.exit_code
    except Exception:
        if running is None or not running.at_work:
            raise
        traceback.print_exc()
        code = 1
    return code, running is not None and running.at_work
