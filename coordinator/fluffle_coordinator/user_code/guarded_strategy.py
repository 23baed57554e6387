"""Wraps a strategy: any error or invalid result ends the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fluffle_common.tensors.checkpoint import add_strategy_prefix
from fluffle_common.tensors.layout import Tensors, check_signature, layout_for
from fluffle_common.tensors.weights import Weights, check_finite, read_only, same_form
from fluffle_coordinator.strategy.base import NO_TENSORS, Contribution, NamedStrategy, Needs
from fluffle_coordinator.user_code.calls import call_guarded, failed


@dataclass(frozen=True)
class GuardedStrategy:
    """A strategy in one round; every method raises ``TaskError`` if the strategy fails.

    The results of a built-in strategy are valid, so checking and copying them would only cost time.
    """

    named: NamedStrategy
    number: int  # of the round, for messages

    @property
    def needs(self) -> Needs:
        """What the strategy needs from the coordinator."""
        return self.named.strategy.needs

    def with_statistics(self, names: frozenset[str]) -> GuardedStrategy:
        """Return the strategy for a model in which these tensors are no parameters."""
        if not hasattr(self.named.strategy, "with_statistics"):
            return self
        strategy = self._call("with_statistics", names)
        with self._checking("with_statistics()", "no strategy"):
            if not callable(getattr(strategy, "fold", None)):
                raise TypeError(f"the value is of type {type(strategy).__name__}")
        return replace(self, named=replace(self.named, strategy=strategy))

    def init(self, weights: Weights) -> Any:
        """Return the state at the start of a run."""
        return self._call("init", self._protected(weights))

    def broadcast(self, state: Any) -> Weights:
        """Return a copy of the tensors that travel with the model, checked to be finite."""
        tensors = self._call("broadcast", state)
        if isinstance(tensors, Mapping) and not tensors:
            return NO_TENSORS
        with self._checking("broadcast()", "tensors that cannot be sent"):
            _check_tensors(tensors)
            check_finite(tensors)
        return _copied(tensors, tensors)

    def fold(self, state: Any, contribution: Contribution) -> Any:
        """Return the state with one more contribution."""
        return self._call("fold", state, contribution, of=contribution.worker)

    def finish(self, state: Any, weights: Weights) -> tuple[Weights, Any]:
        """Close the round; return the new weights and the state of the next round.

        The weights of a user's strategy are checked (finite, with the model's names, shapes and
        dtypes) and copied into one block of memory.
        """
        result = self._call("finish", state, self._protected(weights))
        with self._checking("finish()", "something other than (weights, state)"):
            new, next_state = result
        if self.named.ours:
            return new, next_state
        with self._checking("finish()", "an invalid model"):
            _check_tensors(new)
            same_form(new, weights)
            check_finite(new)
        return _copied(new, weights), next_state

    def dump(self, state: Any) -> Weights:
        """Return the part of a state that the checkpoint stores."""
        tensors = self._call("dump", state)
        if isinstance(tensors, Mapping) and not tensors:
            return NO_TENSORS
        with self._checking("dump()", "a state that cannot be saved"):
            _check_tensors(tensors)
            check_signature(add_strategy_prefix(tensors))  # as the checkpoint names them
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}

    def spent(self, number: int) -> dict[str, float]:
        """Return epsilon and delta after ``number`` rounds; empty if they are not accounted for."""
        if not hasattr(self.named.strategy, "spent"):
            return {}
        budget = self._call("spent", number)
        with self._checking("spent()", "something other than a mapping of names to numbers"):
            return {name: float(budget[name]) for name in ("epsilon", "delta") if name in budget}

    def load(self, saved: Weights, weights: Weights) -> Any:
        """Return the state that ``dump`` saved."""
        return self._call("load", saved, self._protected(weights))

    def _protected(self, weights: Weights) -> Weights:
        """Return the weights, as read-only views for a user's strategy."""
        if self.named.ours:
            return weights
        return {name: read_only(tensor) for name, tensor in weights.items()}

    def _call(self, method: str, *on: Any, of: str = "") -> Any:
        """Call a method of the strategy, about the update ``of`` a worker if there is one."""
        update = f" of the update of {of}" if of else ""
        what, where = self._where(f"{method}(){update}")
        function = getattr(self.named.strategy, method)
        return call_guarded(what, where, function, *on, ours=self.named.ours)

    @contextlib.contextmanager
    def _checking(self, where: str, wrong: str) -> Iterator[None]:
        """Turn the error of a check into a ``TaskError``: the method returned something wrong."""
        try:
            yield
        except (TypeError, ValueError, OverflowError) as why:
            raise failed(*self._where(where), f"it returned {wrong} ({why})") from None

    def _where(self, where: str) -> tuple[str, str]:
        return f"strategy {self.named.name}", f"round {self.number}, in {where}"


def _copied(tensors: Weights, like: Weights) -> Tensors:
    """Copy tensors into one block of memory, since the strategy may change its own later."""
    copy = layout_for(like).empty()
    for name, into in copy.items():
        into[...] = tensors[name]
    return copy


def _check_tensors(value: Any) -> None:
    """Check that a value is a mapping of names to arrays that a checkpoint can hold."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"the value is of type {type(value).__name__}, not a mapping of names to arrays"
        )
    check_signature(value)
    for name, tensor in value.items():
        if not isinstance(tensor, np.ndarray | np.generic):  # arithmetic turns () into a scalar
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
            raise ValueError(f"tensor '{name}' is a {kind}, not a NumPy array; use np.asarray")
