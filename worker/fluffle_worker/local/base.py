"""The ``LocalRule`` protocol: a transformation of the gradients of one worker's training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from fluffle_common.errors import UsageError

Named = Mapping[str, Any]
"""Arrays by the names of the model's tensors, of NumPy or of the task's framework."""
S = TypeVar("S")


class LocalRule(Protocol[S]):
    """What is done to each gradient, as functions of named arrays.

    Use arithmetic operators only, and the rule works in every framework. With ``flax_task``,
    ``gradient`` is compiled by JAX: state is then a tree of arrays, and ``gradient`` changes
    nothing outside of what it returns. FedProx (Li et al., "Federated Optimization in Heterogeneous
    Networks", MLSys 2020) is

        >>> class Proximal:
        ...     def begin(self, received, broadcast, kept):
        ...         return received
        ...
        ...     def gradient(self, gradient, weights, state):
        ...         pull = {name: 0.1 * (weights[name] - state[name]) for name in gradient}
        ...         return {name: gradient[name] + pull[name] for name in gradient}, state
        ...
        ...     def end(self, trained, state):
        ...         return {}
        >>> rule = Proximal()
        >>> rule.gradient({"w": 1.0}, {"w": 3.0}, rule.begin({"w": 1.0}, {}, {}))[0]
        {'w': 1.2}

    A rule with an attribute ``per_example = True`` gets the gradient of each example: arrays with a
    first axis of examples, of which it returns one gradient. ``flax_task`` then lets no training
    loss leave the worker.
    """

    def begin(self, received: Named, broadcast: Named, kept: Named) -> S:
        """Return the state with which a training begins.

        Args:
            received: the weights that have gradients, as received.
            broadcast: what the strategy sends besides the model, by its own names; empty for most
                strategies.
            kept: what ``end`` kept in an earlier round of this run; empty at first.
        """
        ...

    def gradient(self, gradient: Named, weights: Named, state: S) -> tuple[Named, S]:
        """Return the gradient to use, in the same names and shapes, and the next state.

        Args:
            gradient: of the loss on one batch.
            weights: the weights that it was computed at.
            state: what ``begin``, or the last call, returned.
        """
        ...

    def end(self, trained: Named, state: S) -> Named | tuple[Named, Named]:
        """Return what to keep for the next round; an empty mapping keeps nothing.

        For a strategy that asks for extra tensors, return them too: ``(kept, extra)``.
        """
        ...


def ended(found: Any) -> tuple[Any, Any]:
    """Return what ``end`` returned as ``(kept, extra)``."""
    return found if isinstance(found, tuple) and len(found) == 2 else (found, {})


def check_number(rule: str, name: str, value: float, *, zero: bool = False) -> None:
    """Check a setting of a rule: a finite number above 0, or 0 where ``zero`` says so.

    Raises:
        UsageError: saying what it is instead.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        bound = "of 0 or more" if zero else "above 0"
        raise UsageError(
            f"'{name}' of the local rule '{rule}' is {value:g}; a finite number {bound} is expected"
        )


class Identity:
    """The rule that changes nothing."""

    def begin(self, received: Named, broadcast: Named, kept: Named) -> None:
        """See ``LocalRule``."""

    def gradient(self, gradient: Named, weights: Named, state: None) -> tuple[Named, None]:
        """See ``LocalRule``."""
        return gradient, state

    def end(self, trained: Named, state: None) -> Named:
        """See ``LocalRule``."""
        return {}
