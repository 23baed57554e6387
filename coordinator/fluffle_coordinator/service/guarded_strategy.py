"""Wraps a strategy: any error or invalid result ends the run.

Ending the run loses nothing, because no update is acknowledged before its round is on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fluffle_common.cli.user_code import one_line, warn_in_full
from fluffle_common.errors import RunError, TaskError
from fluffle_common.tensors.checkpoint import add_strategy_prefix
from fluffle_common.tensors.layout import Tensors, check_signature, layout_for
from fluffle_common.tensors.weights import Weights, check_finite, read_only, same_form
from fluffle_coordinator.strategy.base import (
    NO_TENSORS,
    Accounted,
    Contribution,
    NamedStrategy,
    Needs,
)

_T = TypeVar("_T")
_CALLERS = frozenset({__file__})


@dataclass(frozen=True)
class GuardedStrategy:
    """A strategy in one round; every method raises ``TaskError`` if the strategy fails.

    Args:
        named: the strategy and its name.
        number: the round, for messages.
    """

    named: NamedStrategy
    number: int

    @property
    def needs(self) -> Needs:
        """What the strategy needs from the coordinator."""
        return self.named.strategy.needs

    @property
    def _trusted(self) -> bool:
        """Whether the strategy is built in; checking its results would only cost time."""
        return self.named.ours

    def init(self, weights: Weights) -> Any:
        """Return the state at the start of a run."""
        return self._call("init()", self.named.strategy.init, self._protected(weights))

    def broadcast(self, state: Any) -> Weights:
        """Return a copy of the tensors that travel with the model, checked to be finite."""
        tensors = self._call("broadcast()", self.named.strategy.broadcast, state)
        if isinstance(tensors, Mapping) and not tensors:
            return NO_TENSORS
        try:
            _check_tensors(tensors)
            check_finite(tensors)
        except ValueError as wrong:
            raise self._wrong(
                "broadcast()", f"it returned tensors that cannot be sent: {wrong}"
            ) from None
        return _copied(tensors, tensors)

    def fold(self, state: Any, contribution: Contribution) -> Any:
        """Return the state with one more contribution."""
        return self._call(
            f"fold() of the update of {contribution.worker}",
            self.named.strategy.fold,
            state,
            contribution,
        )

    def finish(self, state: Any, weights: Weights) -> tuple[Weights, Any]:
        """Close the round; return the new weights and the state of the next round.

        The weights of a user's strategy are checked (finite, with the model's names, shapes and
        dtypes) and copied into one block of memory.
        """
        result = self._call("finish()", self.named.strategy.finish, state, self._protected(weights))
        if self._trusted:
            new, next_state = result
            return new, next_state
        return self._checked(result, weights)

    def dump(self, state: Any) -> Weights:
        """Return the part of a state that the checkpoint stores."""
        tensors = self._call("dump()", self.named.strategy.dump, state)
        if isinstance(tensors, Mapping) and not tensors:
            return NO_TENSORS
        try:
            _check_tensors(tensors)
            check_signature(add_strategy_prefix(tensors))  # as the checkpoint names them
        except ValueError as wrong:
            raise self._wrong(
                "dump()", f"it returned a state that cannot be saved: {wrong}"
            ) from None
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}

    def spent(self, number: int) -> dict[str, float]:
        """Return epsilon and delta after ``number`` rounds; empty if they are not accounted for."""
        strategy = self.named.strategy
        if not isinstance(strategy, Accounted):
            return {}
        budget = self._call("spent()", strategy.spent, number)
        return {name: float(budget[name]) for name in ("epsilon", "delta") if name in budget}

    def load(self, saved: Weights, weights: Weights) -> Any:
        """Return the state that ``dump`` saved."""
        return self._call("load()", self.named.strategy.load, saved, self._protected(weights))

    def _protected(self, weights: Weights) -> Weights:
        """Return the weights, as read-only views for a user's strategy."""
        if self._trusted:
            return weights
        return {name: read_only(tensor) for name, tensor in weights.items()}

    def _checked(self, result: Any, weights: Weights) -> tuple[Tensors, Any]:
        try:
            new, next_state = result
        except (TypeError, ValueError):
            raise self._wrong(
                "finish()", f"it returned {type(result).__name__}, not (weights, state)"
            ) from None
        try:
            _check_tensors(new)
            same_form(new, weights)
            check_finite(new)
        except ValueError as wrong:
            raise self._wrong("finish()", f"it returned an invalid model: {wrong}") from None
        return _copied(new, weights), next_state

    def _call(self, what: str, function: Callable[..., _T], *on: Any) -> _T:
        try:
            return function(*on)
        except RunError:  # the disk refused an update that the strategy keeps there
            raise
        except (Exception, SystemExit) as why:
            if not self._trusted:
                warn_in_full(why, "strategy", _CALLERS)
            raise self._wrong(what, one_line(why, _CALLERS)) from why

    def _wrong(self, what: str, why: str) -> TaskError:
        return TaskError(
            f"the strategy {self.named.name} failed in round {self.number}, in {what}: {why}; fix "
            "it and run the same command again: no update is lost"
        )


def _copied(tensors: Weights, like: Weights) -> Tensors:
    """Copy tensors into one block of memory, since the strategy may change its own later."""
    copy = layout_for(like).empty()
    for name, into in copy.items():
        into[...] = tensors[name]
    return copy


def _check_tensors(value: Any) -> None:
    """Check that a value is a mapping of names to arrays that a checkpoint can hold.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"the value is of type {type(value).__name__}, not a mapping of names to arrays"
        )
    check_signature(value)
    for name, tensor in value.items():
        if not isinstance(tensor, np.ndarray | np.generic):  # arithmetic turns () into a scalar
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
            raise ValueError(f"tensor '{name}' is a {kind}, not a NumPy array; use np.asarray")
