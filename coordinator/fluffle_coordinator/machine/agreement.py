"""Whose classes and whose form of the model are the federation's, and who is refused for others.

A part of the round machine (``machine``), as pure as the rest of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fluffle_common.protocol import events as run_events
from fluffle_common.tensors.groups import FROZEN
from fluffle_coordinator.machine.effects import Effects, Record, Refuse
from fluffle_coordinator.machine.state import State, Worker

_SHOWN = 5  # names of a long list that are shown


def decide(state: State, out: Effects) -> State:
    """Let the majority of the workers present decide on the classes and the model's form.

    Whoever came first is one voice among others; of two equal groups, the earlier one decides.
    """
    if state.decided:
        return state
    state = state.but(decided=True)
    if state.classes is None and any(worker.classes for worker in state.workers.values()):
        votes = Counter(w.classes for w in _by_age(state) if w.classes)
        classes, _ = votes.most_common(1)[0]
        names = [w.name for w in _by_age(state) if w.classes == classes]
        state = state.but(classes=classes, decided_by=_voices(names))
        out.append(Record(run_events.Classes(worker=_voices(names), classes=classes)))
    if state.model is None and not state.has_weights:
        able = [w for w in _by_age(state) if w.model is not None and not unfit(state, w)]
        if able:
            model, _ = Counter(w.model for w in able).most_common(1)[0]
            names = [w.name for w in able if w.model == model]
            state = state.but(model=model, decided_by=_voices(names))
    return refuse_unfit(state, out)


def refuse_unfit(state: State, out: Effects) -> State:
    """Refuse those of the workers present that cannot take part."""
    for worker in _by_age(state):
        if misfit := unfit(state, worker):
            state = refuse(state, worker, misfit, out)
    return state


def _by_age(state: State) -> list[Worker]:
    return sorted(state.workers.values(), key=lambda worker: (worker.joined_at, worker.name))


def _voices(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


class Misfit(NamedTuple):
    """Why a worker cannot take part: in one word, and in words."""

    code: str
    reason: str


def unfit(state: State, worker: Worker) -> Misfit | None:
    """Return why a worker cannot take part; None if it can."""
    by = f" (set by {state.decided_by})" if state.decided_by else ""
    if state.classes is not None and worker.classes != state.classes:
        return Misfit(
            "classes",
            f"worker {worker.name} {_difference(worker.classes, state.classes)}{by}; give the "
            "worker --classes or other data, or the coordinator --classes, which decides",
        )
    model = state.model
    if model is not None and worker.model is not None and worker.model.digest != model.digest:
        theirs, ours = worker.model.summary, model.summary
        if theirs == ours:
            differs = f"other names or shapes of tensors than the federation's ({ours})"
        else:
            differs = f"{theirs}, the federation's has {ours}"
        return Misfit(
            "model",
            f"the model of worker {worker.name} has {differs}{by}; give it the same task, and the "
            "same JAX_ENABLE_X64",
        )
    if state.frozen and FROZEN not in worker.features:
        return Misfit(
            "frozen",
            f"worker {worker.name} takes no frozen tensors from the federation, whose model has "
            "some; give its task share_frozen=True, and it a version of fluffle that knows it",
        )
    return None


def _difference(classes: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    if not classes:
        return f"has no classes, the federation has {_voices(wanted)}"
    extra = [name for name in classes if name not in wanted]
    lacking = [name for name in wanted if name not in classes]
    if not extra and not lacking:
        return "has the federation's classes in another order"
    parts = [f"has the classes {_voices(extra)}, which the federation lacks"] if extra else []
    if lacking:
        parts.append(f"lacks the classes {_voices(lacking)}")
    return " and ".join(parts)


def other_frozen(state: State, worker: Worker) -> run_events.FrozenDiffers | None:
    """Say that a worker has other frozen tensors than one before it, where all keep their own."""
    if not worker.frozen or FROZEN in worker.features:
        return None
    for other in _by_age(state):
        if FROZEN not in other.features and other.frozen and other.frozen != worker.frozen:
            return run_events.FrozenDiffers(worker=worker.name, other=other.name)
    return None


def refuse(
    state: State, worker: Worker, misfit: Misfit, out: Effects, *, again: bool = False
) -> State:
    """Tell a worker that it cannot take part: once in each of its sessions, or ``again``."""
    if worker.name in state.workers:
        state = state.without(worker.name)
    if state.refused.get(worker.name) == worker.session and not again:
        return state
    out += [
        Refuse(worker.name, worker.session, misfit.reason, misfit.code),
        Record(run_events.Refused(worker=worker.name, reason=misfit.reason)),
    ]
    return state.but(refused=state.refused.insert(worker.name, worker.session))
