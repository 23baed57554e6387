"""The coordinator process: from options through the run folder and the broker to an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluffle_common.cli.console import Console
from fluffle_common.cli.runtime import Interrupted, run_until_signalled
from fluffle_common.cli.settings import (
    broker_url,
    check_federation,
    management_of,
    parse_classes,
    parse_config,
)
from fluffle_common.clock import monotonic
from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import Compression, Plan
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.checkpoint import check_names, checkpoint_name, read_checkpoint
from fluffle_common.tensors.weights import check_finite, check_signature
from fluffle_common.transport.base import Transport
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from fluffle_common.transport.reconnect import Backoff
from fluffle_coordinator.machine.state import Rules, State
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.observe.watchers import View, Watcher, Watchers
from fluffle_coordinator.service import endings
from fluffle_coordinator.service.configuration import configuration
from fluffle_coordinator.service.coordinator import Coordinator
from fluffle_coordinator.service.hooks import Hooks
from fluffle_coordinator.service.learning_rate import schedule_of
from fluffle_coordinator.service.schedule_loading import Timing, load_schedule
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.service.stopping import Stopping
from fluffle_coordinator.service.strategy_loading import (
    as_named,
    check_same,
    rules_for,
    uncounted_sampling,
)
from fluffle_coordinator.storage.history import read_history
from fluffle_coordinator.storage.run_store import RunStore, Saved, new_base

if TYPE_CHECKING:
    from fluffle_coordinator.dashboard.page import Page

_STANDBY_POLL_S = 0.5
_STANDBY_NOTICE_S = 30.0


def run_coordinator(rules: Rules, options: dict[str, Any]) -> None:
    """Run a coordinator to its end.

    Raises:
        RunError: if the run stopped before its last round.
        TaskError: if the user's strategy, schedule or selection fails.
        SystemExit: after a signal, with 128 + its number.
    """
    settings = settings_of(rules, options)
    federation = settings.federation
    # Called before every attempt: a private broker may start later, on another port.
    find = functools.partial(broker_url, options["url"])
    transport = AmqpTransport(find, f"fluffle coordinator of {federation}")
    store = RunStore(options["folder"] or Path("runs") / federation)
    topology = Topology(federation, options["queue_type"])
    page = _page(options, topology)
    with Console(options["log_format"], {"federation": federation}) as console:
        journal = Journal(topology)
        watcher = Watchers(View(console), journal, *([page] if page else []))
        if page:
            console.line("page", f"the page is at {page.url}", {"url": page.url})
        run = coordinate(
            settings,
            transport,
            topology,
            store,
            watcher,
            journal=journal,
            page=page,
            fresh=options["fresh"],
        )
        try:
            state = run_until_signalled(page.beside(run) if page else run)
        except Interrupted as signalled:
            sys.exit(signalled.exit_code)
    if state.outcome == "stopped":
        remedy = endings.after_a_stop(state, store.folder)
        raise RunError(f"the run stopped: {state.reason}; {remedy}")


def settings_of(rules: Rules, options: dict[str, Any]) -> CoordinatorSettings:
    """Turn command-line options into settings.

    Raises:
        UsageError: if an option is invalid, or options contradict each other.
        TaskError: if the file of a strategy, schedule or hook fails to load.
    """
    strategy = as_named(options["strategy"])
    if options["keep_updates"] and not strategy.strategy.needs.repeatable:
        raise UsageError(
            f"--keep-updates would store the updates that the strategy {strategy.name} keeps "
            "private, and replay cannot reproduce its random noise; remove --keep-updates"
        )
    timing = Timing(**{field.name: options[field.name] for field in fields(Timing)})
    schedule_name, schedule = load_schedule(timing)
    return CoordinatorSettings(
        federation=check_federation(options["federation"]),
        rules=rules_for(strategy, rules, schedule_name, schedule),
        plan=Plan(
            epochs=options["epochs"],
            steps=options["steps"],
            batch_size=options["batch_size"],
            learning_rate=options["learning_rate"],
            compress=_compress(options),
            config=parse_config(options["config"]),
            train=options["train"] or None,
        ),
        learning_rate_schedule=schedule_of(
            options["learning_rate_schedule"], options["learning_rate"]
        ),
        strategy=strategy,
        schedule=schedule,
        schedule_name=schedule_name,
        classes=parse_classes(options["classes"]),
        init=options["init"],
        verify_users=options["verify_users"],
        keep_updates=options["keep_updates"],
        hooks=Hooks.load(options["evaluate"], options["on_round"]),
        stopping=Stopping(
            monitor=options["monitor"],
            target=options["target"],
            patience=options["patience"],
            time_budget_s=options["time_budget"],
        ),
        backoff=Backoff(give_up_s=options["wait_broker"]),
    )


def _compress(options: dict[str, Any]) -> Compression | None:
    """Return the encoding of the workers' updates, or None for plain tensors."""
    if options["compress"] is not None:
        return Compression.parse(options["compress"])
    dtype: str = options["upload_dtype"]
    return None if dtype == "float32" else Compression(kind=dtype)


async def coordinate(
    settings: CoordinatorSettings,
    transport: Transport,
    topology: Topology,
    store: RunStore,
    watcher: Watcher,
    *,
    journal: Journal | None,
    page: Page | None = None,
    fresh: bool = False,
) -> State:
    """Begin or resume the run in a folder, and run it to its end.

    Args:
        settings: the operator's settings.
        transport: connects to the broker.
        topology: the names of the federation's queues and exchanges.
        store: the run folder; waits while another coordinator holds its lock.
        watcher: receives every event, and passes it on to ``journal`` among others.
        journal: publishes the events on the broker; None publishes none.
        page: the live page, which also shows the rounds of the history.
        fresh: move an earlier run aside and begin a new one.

    Returns:
        The final state of the machine.

    Raises:
        RunError: if the folder cannot be used.
        TaskError: if the user's strategy, schedule or selection fails.
        UsageError: if the run in the folder cannot continue with these settings.
    """
    with _usable(store.folder):
        await _locked(store, watcher)
        if fresh:
            aside = store.start_afresh()
            if aside is not None:
                watcher.record(run_events.Repaired(what=f"the earlier run was moved to {aside}"))
        saved = store.load(settings.federation)
        check_same(settings.strategy, saved, store.folder)
        _check_beginning(settings.init, store, saved, watcher)
        store.note_configuration(configuration(settings, topology), saved.committed)
    for repair in saved.repairs:
        watcher.record(run_events.Repaired(what=repair))
    run, rounds, folder = saved.run, settings.rules.rounds, str(store.folder)
    if saved.committed:
        if page:
            page.remember(read_history(store.folder))
        watcher.record(run_events.Resumed(run=run, rounds=rounds, round=saved.committed))
    else:
        watcher.record(run_events.Started(run=run, rounds=rounds, folder=folder))
    if rounds == settings.strategy.strategy.needs.max_rounds:
        most = f"the strategy {settings.strategy.name} allows no more than {rounds} rounds"
        watcher.record(run_events.Note(what=most))
    for what in uncounted_sampling(settings.strategy, settings.rules):
        watcher.record(run_events.Note(what=what))
    if saved.committed >= settings.rules.rounds:
        done = endings.done_already(store.folder, saved.committed, settings.rules.rounds)
        watcher.record(run_events.Note(what=done))
    if saved.weights is None and settings.init is not None:
        with _usable(store.folder):
            saved = _begin_with(settings.init, store, saved, settings.federation)
    coordinator = Coordinator(
        settings,
        transport=transport,
        topology=topology,
        store=store,
        saved=saved,
        watcher=watcher,
        journal=journal,
    )
    state = await coordinator.run()
    if state.outcome == "finished" and saved.committed < settings.rules.rounds:
        early = state.committed < settings.rules.rounds
        advice = endings.after_an_early_end if early else endings.after_the_end
        watcher.record(run_events.Note(what=advice(store.folder, state.committed)))
    return state


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` about the run folder into a one-line ``RunError``."""
    try:
        yield
    except OSError as why:
        what = f"{why.filename}: {why.strerror}" if why.filename else why.strerror
        raise RunError(
            f"cannot use the run folder {folder} ({what}); it must be writable and on a file "
            "system that supports locks: choose another with --run"
        ) from None


def _check_beginning(init: Path | None, store: RunStore, saved: Saved, watcher: Watcher) -> None:
    """Check that ``--init`` names the weights that an existing run began with.

    Raises:
        UsageError: if the file holds other weights.
    """
    first = store.folder / checkpoint_name(0)
    if init is None or saved.weights is None or not first.exists():
        return
    try:
        other = endings.other_beginning(init, read_checkpoint(first)[0], read_checkpoint(init)[0])
    except UsageError as why:  # unreadable, but the run has its own copy
        watcher.record(run_events.Note(what=f"--init is no longer needed and is ignored: {why}"))
        return
    if other:
        raise UsageError(other)


async def _locked(store: RunStore, watcher: Watcher) -> None:
    """Lock the run folder; wait while another coordinator holds the lock."""
    notified_at = -_STANDBY_NOTICE_S
    try:
        while not store.try_lock():
            if monotonic() - notified_at >= _STANDBY_NOTICE_S:
                watcher.record(run_events.Standby(what=str(store.folder)))
                notified_at = monotonic()
            await asyncio.sleep(_STANDBY_POLL_S)
    except asyncio.CancelledError:
        watcher.record(run_events.Interrupted(folder=str(store.folder)))
        raise


def _page(options: dict[str, Any], topology: Topology) -> Page | None:
    """Return the live page, or None without ``--dashboard``."""
    if options["dashboard"] is None:
        return None
    from fluffle_coordinator.dashboard import needs

    with needs():
        from fluffle_coordinator.dashboard.page import Page
    url = broker_url(options["url"])
    return Page(options["dashboard"], topology, url, management_of(url, options["management"]))


def _begin_with(file: Path, store: RunStore, saved: Saved, federation: str) -> Saved:
    """Begin a run with the weights of a model file, such as another run's last checkpoint.

    Raises:
        UsageError: if the file holds no valid model.
    """
    weights, metadata = read_checkpoint(file)
    try:
        check_signature(weights)
        check_finite(weights)
        check_names(weights)
    except ValueError as wrong:
        raise UsageError(f"{file} cannot be used as first weights: {wrong}") from None
    metadata = {
        "task": metadata.get("task", ""),
        "classes": metadata.get("classes", "[]"),
        "federation": federation,
        "run": saved.run,
        "round": "0",
        "base": new_base(),
    }
    store.save_weights(0, weights, metadata)
    return replace(saved, weights=weights, metadata=metadata)
