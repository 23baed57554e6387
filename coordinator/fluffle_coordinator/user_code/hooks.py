"""Hooks: a user's functions that test the model (``evaluate``) or watch the run (``on_round``).

They run in a thread, one at a time, after the round is on disk and before the next one opens. A
hook that fails loses no round, and a run that a hook stops ends at exactly that round.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fluffle_common.cli.console import warn
from fluffle_common.cli.loading import load_object
from fluffle_common.cli.user_code import warn_in_full
from fluffle_common.cli.user_values import real
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.tensors.weights import Array, Weights, read_only
from fluffle_common.user_errors import one_line, sendable
from fluffle_coordinator.user_code.calls import call_user, misfit

T = TypeVar("T")


class StopRun(Exception):
    """Raised by an ``on_round`` hook to end the run; its text is the reason that users see."""


@dataclass(frozen=True)
class Commit:
    """A round that has just been committed.

    Args:
        round: its number, from 1.
        rounds: the number of rounds of the run.
        weights: a read-only copy of the new model, with the names, shapes and dtypes of the task.
        participants: the number of examples of each worker whose update was counted.
        checkpoint: the file of the new model.
        test: the metrics of the new model from the ``evaluate`` hook; empty without one.
        evaluation: the federated loss and metrics of the *previous* model, because workers
            evaluate the model that they train from; empty if unknown.
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
        """The number of examples that the round trained on."""
        return sum(self.participants.values())


Evaluate = Callable[[Weights], Mapping[str, float]]
"""``evaluate(weights)``: returns a model's metrics by name, on data that the coordinator holds."""

OnRound = Callable[[Commit], str | None]
"""``on_round(commit)``: returns None to go on, or the reason to end the run here."""


@dataclass(frozen=True)
class Hooks:
    """The functions that a user wants called after each commit; each is optional."""

    evaluate: Evaluate | None = None
    on_round: OnRound | None = None

    @classmethod
    def load(cls, evaluate: Any = None, on_round: Any = None) -> Hooks:
        """Return the hooks for functions, or for names such as ``path.py:name``.

        Raises:
            UsageError: if there is no such function, or it does not take one argument.
            TaskError: if its file fails to load.
        """
        return cls(
            _function(evaluate, "--evaluate", "the weights"),
            _function(on_round, "--on-round", "the commit"),
        )

    def __bool__(self) -> bool:
        return self.evaluate is not None or self.on_round is not None

    def names(self) -> dict[str, str]:
        """Return the name of each hook's function, for ``run.json``."""
        return {
            name: getattr(hook, "__qualname__", type(hook).__name__)
            for name, hook in vars(self).items()
            if hook is not None
        }


def _function(given: Any, option: str, argument: str) -> Any:
    function = load_object(given, option) if isinstance(given, str) else given
    if function is None:
        return None
    if not callable(function):
        raise UsageError(f"{option} must be a function, not {type(function).__name__}")
    if any(map(inspect.iscoroutinefunction, (function, function.__call__))):
        raise UsageError(f"{option} must be a plain function; remove its 'async'")
    if wrong := misfit(function, argument):
        raise UsageError(
            f"{option} must be a function that accepts one argument, {argument} ({wrong})"
        )
    return function


class HookCalls:
    """Calls the hooks of one run, off the event loop.

    Each distinct error of a hook is recorded once, and so are metrics that are not finite, and a
    hook that is slow.
    """

    def __init__(self, hooks: Hooks, record: Callable[[run_events.RunEvent], None]) -> None:
        self._hooks, self._record = hooks, record
        self._reported: set[str] = set()

    async def test(self, number: int, weights: Weights) -> dict[str, float]:
        """Return the ``evaluate`` hook's metrics; empty if there is no hook or it fails."""
        hook = self._hooks.evaluate
        if hook is None:
            return {}
        tested = await self._call("evaluate", number, lambda: _metrics(hook(weights)))
        metrics, faults = tested or ({}, {})
        for (name, kind), fault in faults.items():
            if self._is_new(f"metric {name} {kind}"):
                warn(what := f"the evaluate hook's metric {sendable(name)!r:.60} {fault}")
                self._record(run_events.Note(what=what))
        return metrics

    async def on_round(self, commit: Commit) -> str:
        """Return the ``on_round`` hook's reason to end the run; empty to continue."""
        hook = self._hooks.on_round
        if hook is None:
            return ""

        def reason() -> str:
            try:
                returned = hook(commit)
            except StopRun as stop:
                return sendable(str(stop)) or "the on_round hook stopped the run"
            if returned is not None and not isinstance(returned, str):
                raise TaskError(
                    f"the function returned {type(returned).__name__}; expected None, or a string "
                    "with the reason to end the run"
                )
            return sendable(returned or "")

        return await self._call("on_round", commit.round, reason) or ""

    async def _call(self, name: str, number: int, call: Callable[[], T]) -> T | None:
        """Return the result of a hook; if it fails, report the error and return None."""
        hook = f"the {name} hook of round {number}"
        result, why = await call_user(hook, lambda: _attempt(call), self._record)
        if why is not None and self._is_new(text := one_line(why)):
            what = f"round {number} is committed, but its {name} hook failed: {text}"
            self._record(run_events.Note(what=what))
            if isinstance(why, TaskError):
                warn(f"the {name} hook failed: {text}")
            else:
                warn_in_full(why, f"{name} hook")
        return result

    def _is_new(self, text: str) -> bool:
        new = text not in self._reported
        self._reported.add(text)
        return new


def _attempt(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return call(), None
    except BaseException as why:  # even SystemExit: a hook must not end the process
        return None, why


def _metrics(returned: Any) -> tuple[dict[str, float], dict[tuple[str, str], str]]:
    """Return the metrics as floats, and what is wrong with some, by name and kind of fault."""
    if not isinstance(returned, Mapping):
        raise TaskError(
            f"the function returned {type(returned).__name__}; expected a mapping of metric names "
            "to numbers"
        )
    metrics, faults = {}, {}
    for given, value in returned.items():
        name = sendable(str(given))
        if not name.strip():
            faults[name, ""] = "is left out: its name is empty"
            continue
        try:
            metrics[name] = number = real(value)
            if not math.isfinite(number):
                fault = f"is {number}; it is recorded as missing, and never counts as the best"
                faults[name, str(number)] = fault
        except ValueError as wrong:
            faults[name, type(value).__name__] = f"is left out: it is {wrong}"
    return metrics, faults


def copied(weights: Weights) -> dict[str, Array]:
    """Return read-only copies of the arrays.

    Views would not do: ``torch.from_numpy`` writes to read-only arrays.
    """
    return {name: read_only(tensor.copy()) for name, tensor in weights.items()}
