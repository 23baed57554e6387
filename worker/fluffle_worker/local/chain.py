"""Several local rules in sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluffle_common.errors import UsageError
from fluffle_worker.local.base import LocalRule, Named, kept_and_extra


class Chain:
    """A rule that passes each gradient through several rules, in order.

    The arrays that the rules keep are prefixed with the rule's index.

    Args:
        rules: the rules, in order.

    Raises:
        UsageError: if a rule other than the first takes per-example gradients.
    """

    def __init__(self, rules: Sequence[LocalRule[Any]]) -> None:
        self._rules = tuple(rules)
        first, *later = [getattr(rule, "per_example", False) for rule in self._rules]
        self.per_example = first
        if any(later):
            where = type(self._rules[1 + later.index(True)]).__name__
            raise UsageError(
                f"the local rule {where} needs the gradient of each example, but the rules before "
                f"it return only one gradient per batch; put {where} first"
            )

    def begin(self, received: Named, broadcast: Named, kept: Named) -> list[Any]:
        """Return the initial states of all rules."""
        return [
            rule.begin(received, broadcast, _of(number, kept))
            for number, rule in enumerate(self._rules)
        ]

    def gradient(
        self, gradient: Named, weights: Named, state: list[Any]
    ) -> tuple[Named, list[Any]]:
        """Return the gradient after the last rule, and the next states."""
        states = []
        for rule, own in zip(self._rules, state, strict=True):
            gradient, own = rule.gradient(gradient, weights, own)  # noqa: PLW2901
            states.append(own)
        return gradient, states

    def end(self, trained: Named, state: list[Any]) -> tuple[Named, Named]:
        """Return the arrays that the rules keep, and their extra tensors, merged."""
        kept: dict[str, Any] = {}
        sent: dict[str, Any] = {}
        for number, (rule, own) in enumerate(zip(self._rules, state, strict=True)):
            keeps, extra = kept_and_extra(rule.end(trained, own))
            kept |= {f"{number}/{name}": array for name, array in keeps.items()}
            sent |= extra
        return kept, sent


def _of(number: int, kept: Named) -> Named:
    prefix = f"{number}/"
    return {
        name.removeprefix(prefix): array for name, array in kept.items() if name.startswith(prefix)
    }
