"""The ``LocalRule`` protocol: a change to each gradient of a worker's training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from fluffle_common.errors import UsageError

Named = Mapping[str, Any]
"""Arrays by tensor name, of NumPy or of the task's framework."""
S = TypeVar("S")


class LocalRule(Protocol[S]):
    """A change to each gradient before the optimizer sees it, as functions of named arrays.

    A rule that uses arithmetic operators only works in every framework. With ``flax_task``, JAX
    compiles ``gradient``: its state must be a tree of arrays, and it must have no side effects.
    ``torch_task`` calls it with NumPy arrays.

    Example:
        FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020):

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

    A rule with the attribute ``per_example = True`` receives the gradients of all examples of a
    batch, arrays of shape [batch, …], and returns one gradient. The adapters then report no
    training loss, because that would reveal something about the examples.
    """

    def begin(self, received: Named, broadcast: Named, kept: Named) -> S:
        """Return the initial state of a training; NumPy arrays in the arguments are read-only.

        Args:
            received: the trainable weights, as received.
            broadcast: the extra tensors that the strategy sends; empty for most strategies.
            kept: what ``end`` returned in an earlier round of this run; empty at first.
        """
        ...

    def gradient(self, gradient: Named, weights: Named, state: S) -> tuple[Named, S]:
        """Return the gradient to use, with the same names and shapes, and the next state.

        Args:
            gradient: the gradient of the loss on one batch.
            weights: the weights at which it was computed.
            state: the state from ``begin`` or the previous call.
        """
        ...

    def end(self, trained: Named, state: S) -> Named | tuple[Named, Named]:
        """Return the arrays to keep for the next round; empty to keep nothing.

        For a strategy that asks for extra tensors, return ``(kept, extra)``.
        """
        ...


def kept_and_extra(result: Any) -> tuple[Any, Any]:
    """Return the result of ``LocalRule.end`` as a pair ``(kept, extra)``."""
    return result if isinstance(result, tuple) and len(result) == 2 else (result, {})


def check_number(rule: str, name: str, value: float, *, zero: bool = False) -> None:
    """Check that a rule's setting is finite and above 0, or 0 if ``zero`` allows that.

    Raises:
        UsageError: if it is not.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        bound = "of 0 or more" if zero else "above 0"
        raise UsageError(
            f"'{name}' of the local rule '{rule}' is {value:g}; expected a finite number {bound}"
        )


class Plain:
    """The rule that has no state and changes and keeps nothing; others override what differs."""

    def begin(self, received: Named, broadcast: Named, kept: Named) -> Any:
        """Return no state."""

    def gradient(self, gradient: Named, weights: Named, state: Any) -> tuple[Named, Any]:
        """Return the gradient unchanged."""
        return gradient, state

    def end(self, trained: Named, state: Any) -> Named:
        """Keep nothing."""
        return {}
