"""A user's strategy, called with care: what it does wrong ends the run, and nothing else.

Nothing is acknowledged before its round is on disk, so that a run which ends here loses nothing.
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
from fluffle_common.tensors.weights import Weights, check_finite, same_form
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
    """A strategy in one round; every method raises ``TaskError`` for what the strategy does wrong.

    Args:
        named: the strategy.
        number: the round.
    """

    named: NamedStrategy
    number: int

    @property
    def needs(self) -> Needs:
        """What it asks of the coordinator."""
        return self.named.strategy.needs

    @property
    def _trusted(self) -> bool:
        """Whether it is ours: what it returns is sound, and a closer look would take its time."""
        return self.named.ours

    def init(self, weights: Weights) -> Any:
        """Return the state that a run begins with."""
        return self._call("init()", self.named.strategy.init, self._shown(weights))

    def broadcast(self, state: Any) -> Weights:
        """Return what travels beside the model: finite, in one piece, and nobody else's."""
        found = self._call("broadcast()", self.named.strategy.broadcast, state)
        if isinstance(found, Mapping) and not found:
            return NO_TENSORS
        try:
            _check_tensors(found)
            check_finite(found)
        except ValueError as wrong:
            raise self._wrong(
                "broadcast()", f"it returned tensors that cannot be sent: {wrong}"
            ) from None
        return _own(found, found)

    def fold(self, state: Any, one: Contribution) -> Any:
        """Take one contribution in."""
        return self._call(
            f"fold() of the update of {one.worker}", self.named.strategy.fold, state, one
        )

    def finish(self, state: Any, weights: Weights) -> tuple[Weights, Any]:
        """Close the round; the weights are of the model's form, finite, and in one piece."""
        found = self._call("finish()", self.named.strategy.finish, state, self._shown(weights))
        if self._trusted:
            new, emptied = found
            return new, emptied
        return self._sound(found, weights)

    def dump(self, state: Any) -> Weights:
        """Return what is to be kept of a state."""
        found = self._call("dump()", self.named.strategy.dump, state)
        if isinstance(found, Mapping) and not found:
            return NO_TENSORS
        try:
            _check_tensors(found)
            check_signature(add_strategy_prefix(found))  # their names are longer there
        except ValueError as wrong:
            raise self._wrong(
                "dump()", f"it returned a state that cannot be saved: {wrong}"
            ) from None
        return {name: np.asarray(tensor) for name, tensor in found.items()}

    def spent(self, number: int) -> dict[str, float]:
        """Return what so many rounds cost of privacy; nothing if that is not counted."""
        strategy = self.named.strategy
        if not isinstance(strategy, Accounted):
            return {}
        found = self._call("spent()", strategy.spent, number)
        return {name: float(found[name]) for name in ("epsilon", "delta") if name in found}

    def load(self, saved: Weights, weights: Weights) -> Any:
        """Return the state that was kept."""
        shown = self._shown(weights)
        return self._call("load()", self.named.strategy.load, saved, shown)

    def _shown(self, weights: Weights) -> Weights:
        """Return weights as a user's strategy sees them: it cannot change them by mistake."""
        if self._trusted:
            return weights
        shown = {name: tensor.view() for name, tensor in weights.items()}
        for tensor in shown.values():
            tensor.flags.writeable = False
        return shown

    def _sound(self, found: Any, weights: Weights) -> tuple[Tensors, Any]:
        try:
            new, emptied = found
        except (TypeError, ValueError):
            raise self._wrong(
                "finish()", f"it returned {type(found).__name__}, not (weights, state)"
            ) from None
        try:
            _check_tensors(new)
            same_form(new, weights)
            check_finite(new)
        except ValueError as wrong:
            raise self._wrong("finish()", f"it returned an invalid model: {wrong}") from None
        return _own(new, weights), emptied

    def _call(self, what: str, function: Callable[..., _T], *on: Any) -> _T:
        try:
            return function(*on)
        except RunError:  # of the disk, when it keeps an update there
            raise
        except (Exception, SystemExit) as why:
            if not self._trusted:
                warn_in_full(why, "strategy", _CALLERS)
            raise self._wrong(what, one_line(why)) from why

    def _wrong(self, what: str, why: str) -> TaskError:
        return TaskError(
            f"the strategy {self.named.name} failed in round {self.number}, in {what}: {why}; fix "
            "it and run the same command again: no update is lost"
        )


def _own(found: Weights, like: Weights) -> Tensors:
    """Copy tensors into one piece of memory: the strategy may go on using its own."""
    copy = layout_for(like).empty()
    for name, into in copy.items():
        into[...] = found[name]
    return copy


def _check_tensors(found: Any) -> None:
    """Check that these are named arrays that a checkpoint can hold.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"it is of type {type(found).__name__}, not a mapping of names to arrays")
    check_signature(found)
    for name, tensor in found.items():
        if not isinstance(tensor, np.ndarray | np.generic):  # arithmetic makes () a scalar
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
            raise ValueError(f"tensor '{name}' is a {kind}, not a NumPy array; use np.asarray")
