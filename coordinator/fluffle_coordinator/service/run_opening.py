"""Opens a run folder: waits for its lock, then begins a run or resumes the one that is there.

``first_state`` is what the coordinator's machine then starts from.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluffle_common.cli.open_files import too_many_files
from fluffle_common.clock import monotonic, real_sleep
from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.model_form import model_form
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.checkpoint import (
    check_names,
    checkpoint_name,
    names_in,
    read_checkpoint,
)
from fluffle_common.tensors.frozen import IN_METADATA, Frozen, frozen_of, read_frozen
from fluffle_common.tensors.groups import STATISTICS, check_statistics
from fluffle_common.tensors.weights import Array, check_finite, check_signature
from fluffle_coordinator.machine import machine
from fluffle_coordinator.machine.records import Ticket
from fluffle_coordinator.machine.state import FIRST_WEIGHTS, State, Table
from fluffle_coordinator.observe.watchers import Watcher
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.service.standby import Standby
from fluffle_coordinator.storage.round_stats import median_norms
from fluffle_coordinator.storage.run_file import count_start
from fluffle_coordinator.storage.run_store import RunStore, Saved, new_base, sampling_secret
from fluffle_coordinator.user_code.strategy_loading import check_same

FirstModel = tuple[dict[str, Array], dict[str, str], Frozen]
"""The weights, the metadata and the frozen tensors of a model file."""

_STANDBY_POLL_S = 0.5


async def open_run(
    settings: CoordinatorSettings,
    topology: Topology,
    store: RunStore,
    watcher: Watcher,
    *,
    fresh: bool,
) -> Saved:
    """Lock a run folder and return the state of its run, which is new if there was none.

    ``fresh`` moves an existing run aside and begins a new one. ``watcher`` receives events about
    standby, repairs and ignored options.

    Raises:
        RunError: if the folder cannot be used.
        UsageError: if the run cannot continue with these settings.
    """
    with usable(store.shown):
        await _lock(store, watcher)
        first = None
        if fresh:
            if settings.init is not None:  # it may be a model of the run that is moved aside
                first = read_first_model(settings.init)
            aside = store.start_afresh()
            if aside is not None:
                watcher.record(run_events.Note(what=f"the earlier run was moved to {aside}"))
        saved = store.load(settings.federation)
        check_same(settings.strategy, saved, store.shown)
        if settings.init is not None and saved.weights is None:
            first = first or read_first_model(settings.init)
            saved = begin_with(first, store, saved, settings.federation)
        elif settings.init is not None:
            check_first_weights(settings.init, store, watcher)
        store.note_configuration(settings.configuration(topology), saved.committed)
    for repair in saved.repairs:
        watcher.record(run_events.Repaired(what=repair))
    return saved


async def _lock(store: RunStore, watcher: Watcher) -> None:
    """Lock the run folder; wait while another coordinator holds the lock."""
    standby = Standby(str(store.shown), watcher)
    try:
        while not store.try_lock():
            standby.waits(store.holder())
            await real_sleep(_STANDBY_POLL_S)
    except asyncio.CancelledError:
        watcher.record(run_events.Interrupted(folder=str(store.shown)))
        raise
    standby.takes_over()


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` about the run folder into a one-line ``RunError``."""
    try:
        yield
    except OSError as why:
        if text := too_many_files(why):
            raise RunError(text) from None
        what = f"{why.filename}: {why.strerror}" if why.filename else why.strerror
        remedy = "choose a writable folder with --run, on a file system that supports locks"
        if why.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free disk space and run the same command again"
        elif why.filename and Path(why.filename).suffix in (".safetensors", ".json", ".jsonl"):
            remedy = "make this file readable and writable, and run the same command again"
        raise RunError(f"cannot use the run folder {folder} ({what}); {remedy}") from None


def read_first_model(file: Path) -> FirstModel:
    """Read the model file of ``--init``, such as another run's last checkpoint.

    Raises:
        UsageError: if the file holds no valid model, or its frozen tensors are missing.
    """
    weights, metadata = read_checkpoint(file)
    frozen = read_frozen(file.parent, metadata.get(IN_METADATA, ""))
    try:
        check_signature(weights)
        check_finite(weights)
        check_finite(frozen.tensors)
        check_names(weights)
        check_statistics(names_in(metadata, STATISTICS), weights)
    except ValueError as wrong:
        raise UsageError(f"{file} cannot be used as the first weights: {wrong}") from None
    return weights, metadata, frozen


def begin_with(first: FirstModel, store: RunStore, saved: Saved, federation: str) -> Saved:
    """Begin a run with the model of a file."""
    weights, metadata, frozen = first
    metadata = {
        "task": metadata.get("task", ""),
        **{key: json.dumps(names_in(metadata, key)) for key in ("classes", STATISTICS)},
        "federation": federation,
        "run": saved.run,
        "round": "0",
        "base": new_base(),
    }
    store.save_first(weights, metadata, frozen)
    return replace(saved, weights=weights, metadata=metadata, frozen=frozen)


def check_first_weights(file: Path, store: RunStore, watcher: Watcher) -> None:
    """Check that ``--init`` names the weights that an existing run began with.

    Raises:
        UsageError: if the file holds different weights.
    """
    first = store.folder / checkpoint_name(0)
    if not first.exists():
        return
    try:
        (ours, about), (theirs, said) = read_checkpoint(first), read_checkpoint(file)
        # By their bytes, so that a NaN equals itself.
        same = frozen_of(ours).digest == frozen_of(theirs).digest
        same = same and about.get(IN_METADATA) == said.get(IN_METADATA)
    except UsageError as why:  # unreadable, but the run has its own copy
        watcher.record(run_events.Note(what=f"--init is no longer needed and is ignored ({why})"))
        return
    if not same:
        raise UsageError(
            f"--init {file} conflicts with the existing run, which began with different weights; "
            "remove --init to continue the existing run, or add --fresh to start a new run (the "
            "existing run is moved aside)"
        )


def first_state(settings: CoordinatorSettings, saved: Saved, folder: Path, enough: str) -> State:
    """Return the machine's first state, for a new run or a resumed one."""
    rules = settings.rules
    if settings.strategy.strategy.needs.rate is not None:
        rules = replace(rules, secret=sampling_secret(folder))
    commits = [line for line in saved.lines if line["event"] == "committed"]
    updates = [update for line in commits for update in line["participants"]]
    evaluated = (line for line in saved.lines if line["event"] == "evaluated")
    evaluations = (each for line in evaluated for each in line["evaluations"])
    announced: dict[str, int] = {}
    for update in updates:
        worker = update["worker"]
        announced[worker] = max(update["num_examples"], announced.get(worker, 0))
    return machine.start(
        rules,
        saved.run,
        monotonic(),
        schedule=settings.schedule,
        committed=saved.committed,
        counted={line["round"]: _tickets(line["participants"]) for line in commits},
        earlier_starts=count_start(folder) if settings.schedule.continuous else 0,
        earlier=saved.earlier,
        asked_in=Table({name: line["round"] for line in commits for name in line["asked"]}),
        train_s=Table({u["worker"]: u["seconds"] for u in updates if u["seconds"] is not None}),
        evaluation=Table(
            {
                each["worker"]: {**each.get("metrics", {}), "loss": each["loss"]}
                for each in evaluations
            }
        ),
        median_norms=median_norms(commits),
        announced=Table(announced),
        evaluated=saved.evaluated,
        enough=enough,
        has_weights=saved.weights is not None,
        base=saved.base,
        classes=settings.classes or names_in(saved.metadata, "classes") or None,
        model=None
        if saved.weights is None
        else model_form(saved.weights, saved.frozen.tensors, names_in(saved.metadata, STATISTICS)),
        frozen=saved.frozen.digest,
        classes_by="--classes" if settings.classes else FIRST_WEIGHTS,
    )


def _tickets(updates: Iterable[Mapping[str, Any]]) -> frozenset[Ticket]:
    return frozenset(Ticket(update["worker"], update["sequence"]) for update in updates)
