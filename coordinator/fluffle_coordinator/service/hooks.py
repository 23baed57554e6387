"""Hooks: a user's own code after each commit, a test of the model and a look at the round.

They run in a thread, one after the other, when the round is on disk and before the next one opens:
whatever they take or do wrong, the round is kept, and a run that they stop ends right there.
"""

from __future__ import annotations

import asyncio
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fluffle_common.cli.loading import load_object
from fluffle_common.cli.user_code import one_line, warn_in_full
from fluffle_common.errors import UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.tensors.weights import Array, Weights

T = TypeVar("T")
_CALLERS = frozenset({__file__})


class StopRun(Exception):
    """Raised by an ``on_round`` hook to end the run; its text is the reason, for people."""


@dataclass(frozen=True)
class Commit:
    """A round that has just been committed.

    Args:
        round: its number, from 1.
        rounds: how many rounds the run is to have.
        weights: the new model, read-only; names, shapes and dtypes as the tasks have them.
        participants: the workers whose updates are in it, with their numbers of examples.
        checkpoint: the file of the model.
        test: what the ``evaluate`` hook measured of the new model; empty if there is none.
        evaluation: the federated loss and metrics of the model *before*, from which this round was
            trained, since workers evaluate what they are sent; empty where they are not known.
    """

    round: int
    rounds: int
    weights: Weights
    participants: Mapping[str, int]
    checkpoint: Path
    test: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """How many examples the new model was trained on in this round."""
        return sum(self.participants.values())


Evaluate = Callable[[Weights], Mapping[str, float]]
"""``evaluate(weights)``: metrics of a model by name, on data that the coordinator holds."""

OnRound = Callable[[Commit], str | None]
"""``on_round(commit)``: returns None to go on, or the reason to end the run here."""


@dataclass(frozen=True)
class Hooks:
    """What a user wants done after each commit; each is optional."""

    evaluate: Evaluate | None = None
    on_round: OnRound | None = None

    @classmethod
    def load(cls, evaluate: Any = None, on_round: Any = None) -> Hooks:
        """Take hooks as functions, or as ``path.py:name``.

        Raises:
            UsageError: where there is no such function.
            TaskError: where its file fails to load.
        """
        return cls(_function(evaluate, "--evaluate"), _function(on_round, "--on-round"))

    def __bool__(self) -> bool:
        return self.evaluate is not None or self.on_round is not None

    def names(self) -> dict[str, str]:
        """Return what the hooks are called, for the record."""
        return {
            name: getattr(hook, "__qualname__", type(hook).__name__)
            for name, hook in vars(self).items()
            if hook is not None
        }


NO_HOOKS = Hooks()


def _function(given: Any, option: str) -> Any:
    found = load_object(given, option) if isinstance(given, str) else given
    if found is not None and not callable(found):
        raise UsageError(f"{option} is {type(found).__name__}; a function is expected")
    return found


class HookCalls:
    """Calls the hooks of one run, off the event loop.

    Args:
        hooks: the hooks.
        record: told what they do wrong, each thing once.
    """

    def __init__(self, hooks: Hooks, record: Callable[[run_events.RunEvent], None]) -> None:
        self._hooks, self._record = hooks, record
        self._told: set[str] = set()

    async def test(self, number: int, weights: Weights) -> dict[str, float]:
        """Return the metrics of a round's model; none where the hook fails or is not there."""
        hook = self._hooks.evaluate
        if hook is None:
            return {}

        def metrics() -> dict[str, float]:
            return _metrics(hook(weights))

        return await self._call("evaluate", number, metrics) or {}

    async def look(self, commit: Commit) -> str:
        """Show a commit to the hook; return why the run is to end here, or an empty text."""
        hook = self._hooks.on_round
        if hook is None:
            return ""

        def reason() -> str:
            try:
                found = hook(commit)
            except StopRun as stop:
                return str(stop) or "the on_round hook stopped the run"
            if found is not None and not isinstance(found, str):
                raise TypeError(f"it returned {type(found).__name__}; None or a reason is expected")
            return found or ""

        return await self._call("on_round", commit.round, reason) or ""

    async def _call(self, name: str, number: int, call: Callable[[], T]) -> T | None:
        """Return what a hook returns; None where it fails, which is told."""
        found, why = await asyncio.to_thread(_attempt, call)
        if why is not None and (text := one_line(why)) not in self._told:
            self._told.add(text)
            told = f"round {number} is kept, but its {name} hook failed: {text}"
            self._record(run_events.Note(what=told))
            warn_in_full(why, f"{name} hook", _CALLERS)
        return found


def _attempt(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return call(), None
    except (Exception, SystemExit) as why:  # whatever a user's code raises is told, not lost
        return None, why


def _metrics(found: Any) -> dict[str, float]:
    """Return metrics as floats.

    Raises:
        TypeError: for anything but names with numbers.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"it returned {type(found).__name__}; metrics by name are expected")
    metrics = {}
    for name, value in found.items():
        if not isinstance(value, numbers.Real) and getattr(value, "shape", None) != ():
            raise TypeError(f"the metric {name!r} is {type(value).__name__}, not a number")
        metrics[str(name)] = float(value)
    return metrics


def read_only(weights: Weights) -> dict[str, Array]:
    """Return views of arrays that cannot be written to."""
    views = {name: tensor.view() for name, tensor in weights.items()}
    for view in views.values():
        view.flags.writeable = False
    return views
