"""The vote on the federation's classes and model form; workers that differ are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fluffle_common.plural import listed
from fluffle_common.protocol import events as run_events
from fluffle_common.tensors.groups import FROZEN
from fluffle_coordinator.machine.effects import Effects, Refuse
from fluffle_coordinator.machine.records import Worker
from fluffle_coordinator.machine.state import FIRST_WEIGHTS, State

_NAMES_SHOWN = 5


def decide(state: State, out: Effects) -> State:
    """Let the majority of the workers present decide, once, and refuse the others.

    If two groups are of equal size, the one whose first member joined earlier decides.
    """
    if state.decided:
        return state
    state = state.replace(decided=True)
    if state.classes is None and any(worker.classes for worker in state.workers.values()):
        votes = Counter(w.classes for w in _by_age(state) if w.classes)
        classes, _ = votes.most_common(1)[0]
        names = [w.name for w in _by_age(state) if w.classes == classes]
        state = state.replace(classes=classes, classes_by=listed(names, _NAMES_SHOWN))
        out.append(run_events.Classes(worker=listed(names, _NAMES_SHOWN), classes=classes))
    if state.model is None and not state.has_weights:
        able = [w for w in _by_age(state) if w.model is not None and not unfit(state, w)]
        if able:
            model, _ = Counter(w.model for w in able).most_common(1)[0]
            names = [w.name for w in able if w.model == model]
            state = state.replace(model=model, model_by=listed(names, _NAMES_SHOWN))
    return refuse_unfit(state, out)


def refuse_unfit(state: State, out: Effects) -> State:
    """Refuse the connected workers that do not fit."""
    for worker in _by_age(state):
        if misfit := unfit(state, worker):
            state = refuse(state, worker, misfit, out)
    return state


def _by_age(state: State) -> list[Worker]:
    return sorted(state.workers.values(), key=lambda worker: (worker.joined_at, worker.name))


class Misfit(NamedTuple):
    """Why a worker cannot take part: a code for programs and a reason for people."""

    code: str
    reason: str


def unfit(state: State, worker: Worker) -> Misfit | None:
    """Return why a worker cannot take part; None if it can."""
    if state.classes is not None and worker.classes != state.classes:
        return Misfit(
            "classes",
            f"worker {worker.name} {_difference(worker.classes, state.classes)}; the federation's "
            f"classes come from {state.classes_by}; start this worker with --classes or "
            "different data, or the coordinator with --classes",
        )
    model = state.model
    if model is not None and worker.model is not None and worker.model.digest != model.digest:
        theirs, ours = worker.model.summary, model.summary
        difference = f"{theirs}, but the federation's model has {ours}"
        if theirs == ours:
            difference = f"other tensor names, shapes or statistics than the federation's ({ours})"
        remedy = "the same task and the same JAX_ENABLE_X64 as the other workers"
        if state.model_by == FIRST_WEIGHTS:
            remedy += ", or start a new run with different first weights (--fresh, --init)"
            if "; statistics: " in theirs and "; statistics: " not in ours:
                remedy += "; fluffle.save_model writes a file that names the model's statistics"
        return Misfit(
            "model",
            f"the model of worker {worker.name} has {difference}; that model comes from "
            f"{state.model_by}; give this worker {remedy}",
        )
    if state.frozen and FROZEN not in worker.features:
        return Misfit(
            "frozen",
            f"worker {worker.name} does not accept frozen tensors, but this federation shares "
            "frozen tensors; set share_frozen=True in the worker's task, or install a newer "
            "fluffle on the worker",
        )
    return None


def _difference(classes: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    if not classes:
        return f"has no classes, but the federation has {listed(wanted, _NAMES_SHOWN)}"
    theirs, ours = set(classes), set(wanted)  # each may have thousands
    extra = [name for name in classes if name not in ours]
    missing = [name for name in wanted if name not in theirs]
    if not extra and not missing:
        return "has the federation's classes in another order"
    parts = [f"has the {_classes(extra)}, which the federation lacks"] if extra else []
    if missing:
        parts.append(f"lacks the {_classes(missing)}")
    return ", and ".join(parts)


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {listed(names, _NAMES_SHOWN)}"


def other_frozen(state: State, worker: Worker) -> run_events.FrozenDiffers | None:
    """Return an event if a worker's own frozen tensors differ from those of an earlier worker."""
    if not worker.frozen or FROZEN in worker.features:
        return None
    for other in _by_age(state):
        if FROZEN not in other.features and other.frozen and other.frozen != worker.frozen:
            return run_events.FrozenDiffers(worker=worker.name, other=other.name)
    return None


def refuse(
    state: State, worker: Worker, misfit: Misfit, out: Effects, *, again: bool = False
) -> State:
    """Refuse a worker, and report it: once per session, unless it is to be done ``again``."""
    if worker.name in state.workers:
        state = state.without(worker.name)
    if state.refused.get(worker.name) == worker.session and not again:
        return state
    out += [
        Refuse(worker.name, worker.session, misfit.reason, misfit.code),
        run_events.Refused(worker=worker.name, reason=misfit.reason),
    ]
    return state.replace(refused=state.refused.insert(worker.name, worker.session))
