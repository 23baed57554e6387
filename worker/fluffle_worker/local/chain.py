"""Several local rules, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluffle_common.errors import UsageError
from fluffle_worker.local.base import LocalRule, Named, ended


class Chain:
    """Gives each gradient to the first rule, what that returns to the next, and so on.

    Each keeps what it keeps under a name of its own.

    Args:
        rules: in their order.

    Raises:
        UsageError: if a rule that takes the gradients of single examples is not the first.
    """

    def __init__(self, rules: Sequence[LocalRule[Any]]) -> None:
        self._rules = tuple(rules)
        first, *later = [getattr(rule, "per_example", False) for rule in self._rules]
        self.per_example = first
        if any(later):
            where = type(self._rules[1 + later.index(True)]).__name__
            raise UsageError(
                f"the local rule {where} takes the gradient of each example, which those before it "
                "have added up; name it first"
            )

    def begin(self, received: Named, broadcast: Named, kept: Named) -> list[Any]:
        """See ``LocalRule``."""
        return [
            rule.begin(received, broadcast, _of(number, kept))
            for number, rule in enumerate(self._rules)
        ]

    def gradient(
        self, gradient: Named, weights: Named, state: list[Any]
    ) -> tuple[Named, list[Any]]:
        """See ``LocalRule``."""
        after = []
        for rule, own in zip(self._rules, state, strict=True):
            gradient, new = rule.gradient(gradient, weights, own)
            after.append(new)
        return gradient, after

    def end(self, trained: Named, state: list[Any]) -> tuple[Named, Named]:
        """See ``LocalRule``; what they send goes to the one strategy that there is."""
        kept: dict[str, Any] = {}
        sent: dict[str, Any] = {}
        for number, (rule, own) in enumerate(zip(self._rules, state, strict=True)):
            keeps, extra = ended(rule.end(trained, own))
            kept |= {f"{number}/{name}": array for name, array in keeps.items()}
            sent |= extra
        return kept, sent


def _of(number: int, kept: Named) -> Named:
    prefix = f"{number}/"
    return {
        name.removeprefix(prefix): array for name, array in kept.items() if name.startswith(prefix)
    }
