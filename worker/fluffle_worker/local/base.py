"""The ``LocalRule`` protocol: a transformation of the gradients of one worker's training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

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
