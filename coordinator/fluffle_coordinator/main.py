"""From options to a running coordinator: the run folder, the broker, signals, the exit code."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluffle_common.amqp import AmqpTransport
from fluffle_common.checkpoint import read_checkpoint
from fluffle_common.console import Console
from fluffle_common.errors import RunError, UsageError
from fluffle_common.messages import Plan
from fluffle_common.settings import broker_url, check_federation, parse_config
from fluffle_common.signals import Interrupted, run_until_signalled
from fluffle_common.topology import Topology
from fluffle_common.transport import Backoff
from fluffle_common.weights import check_all_finite
from fluffle_coordinator.run_state import Rules, State
from fluffle_coordinator.service import Coordinator, CoordinatorSettings
from fluffle_coordinator.store import RunStore, Saved
from fluffle_coordinator.view import View, Watcher, Watchers

_STANDBY_POLL_S = 0.5
_STANDBY_TOLD_S = 30.0


def run_coordinator(rules: Rules, options: dict[str, Any]) -> None:
    """Run a coordinator to its end.

    Raises:
        RunError: where the run stopped before its last round.
        SystemExit: after a signal, with 128 + its number.
    """
    federation = check_federation(options["federation"])
    settings = CoordinatorSettings(
        federation=federation,
        rules=rules,
        plan=Plan(
            epochs=options["epochs"],
            batch_size=options["batch_size"],
            learning_rate=options["learning_rate"],
            config=parse_config(options["config"]),
        ),
        classes=tuple(options["classes"].split(",")) if options["classes"] else None,
        init=options["init"],
        verify_users=options["verify_users"],
        backoff=Backoff(give_up_s=options["wait_broker"]),
    )
    transport = AmqpTransport(broker_url(options["url"]), f"fluffle coordinator of {federation}")
    store = RunStore(options["folder"] or Path("runs") / federation)
    topology = Topology(federation, options["queue_type"])
    with Console(options["log_format"], {"federation": federation}) as console:
        watcher = Watchers(View(console))
        try:
            state = run_until_signalled(
                _run(settings, transport, topology, store, watcher, fresh=options["fresh"])
            )
        except Interrupted as signalled:
            watcher.tell("interrupted", {"folder": str(store.folder)})
            sys.exit(signalled.exit_code)
    if state.outcome == "stopped":
        raise RunError(f"the run stopped: {state.reason}; the same command goes on from there")


async def _run(
    settings: CoordinatorSettings,
    transport: AmqpTransport,
    topology: Topology,
    store: RunStore,
    watcher: Watcher,
    *,
    fresh: bool,
) -> State:
    await _locked(store, watcher)
    if fresh:
        aside = store.start_afresh()
        if aside is not None:
            watcher.tell("repaired", {"what": f"the earlier run is in {aside} now"})
    saved = store.load(settings.federation)
    for repair in saved.repairs:
        watcher.tell("repaired", {"what": repair})
    if saved.committed:
        watcher.tell("resumed", {"run": saved.run, "round": saved.committed})
    else:
        watcher.tell("started", {"run": saved.run, "folder": str(store.folder)})
    if saved.weights is None and settings.init is not None:
        saved = _begin_with(settings.init, store, saved, settings.federation)
    coordinator = Coordinator(
        settings, transport=transport, topology=topology, store=store, saved=saved, watcher=watcher
    )
    return await coordinator.run()


async def _locked(store: RunStore, watcher: Watcher) -> None:
    """Wait until no other coordinator has the run folder."""
    told_at = -_STANDBY_TOLD_S
    while not store.try_lock():
        if time.monotonic() - told_at >= _STANDBY_TOLD_S:
            watcher.tell("standby", {"what": str(store.folder)})
            told_at = time.monotonic()
        await asyncio.sleep(_STANDBY_POLL_S)


def _begin_with(file: Path, store: RunStore, saved: Saved, federation: str) -> Saved:
    """Take the first weights from a model file, such as another run's last."""
    weights, metadata = read_checkpoint(file)
    try:
        check_all_finite(weights)
    except ValueError as wrong:
        raise UsageError(f"{file} is no model to begin with: {wrong}") from None
    metadata = {
        "task": metadata.get("task", ""),
        "classes": metadata.get("classes", "[]"),
        "federation": federation,
        "run": saved.run,
        "round": "0",
    }
    store.save_weights(0, weights, metadata)
    return replace(saved, weights=weights, metadata=metadata)
