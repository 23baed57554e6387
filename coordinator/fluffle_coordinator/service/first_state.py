"""The first state of a coordinator's machine, from the settings and the run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fluffle_common.clock import monotonic
from fluffle_common.protocol.model_form import model_form
from fluffle_common.tensors.checkpoint import classes_in
from fluffle_coordinator.machine import machine
from fluffle_coordinator.machine.state import State, Table
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_file import count_start
from fluffle_coordinator.storage.sampling_secret import sampling_secret
from fluffle_coordinator.storage.saved_run import Saved


def first_state(settings: CoordinatorSettings, saved: Saved, folder: Path, enough: str) -> State:
    """Return the machine's first state, for a new run or a resumed one."""
    rules = settings.rules
    if settings.strategy.strategy.needs.rate is not None:
        rules = replace(rules, secret=sampling_secret(folder))
    return machine.start(
        rules,
        saved.run,
        monotonic(),
        schedule=settings.schedule,
        committed=saved.committed,
        counted=saved.counted,
        sequence=saved.sequence,
        earlier_starts=count_start(folder) if settings.schedule.continuous else 0,
        earlier=saved.earlier,
        asked_in=Table(saved.asked_in),
        train_s=Table(saved.train_s),
        median_norms=saved.median_norms,
        announced=Table(saved.announced),
        evaluated=saved.evaluated,
        enough=enough,
        has_weights=saved.weights is not None,
        base=saved.base,
        classes=settings.classes or classes_in(saved.metadata) or None,
        model=None if saved.weights is None else model_form(saved.weights, saved.frozen.tensors),
        frozen=saved.frozen.digest,
        decided_by="--classes" if settings.classes else "this run's first weights",
    )
