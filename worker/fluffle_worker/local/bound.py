"""A local rule as a task uses it: checked, its errors in one line, what it keeps kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.local.base import Identity, LocalRule, Named
from fluffle_worker.user_code import one_line

_METHODS = ("begin", "gradient", "end")
_ROUNDS_KEPT = 2  # a round that is trained again needs what the one before it kept


class _Kept(NamedTuple):
    run: str
    round: int
    arrays: Named


class BoundRule:
    """A rule, checked.

    A task calls ``begin`` with the weights that it received, ``gradient`` at each step, and ``end``
    with the trained weights. What ``end`` keeps is given to ``begin`` in a later round of the same
    run, and lives in memory only.

    Args:
        rule: the user's rule; None for the identity.
        name: what it is called, for errors.
    """

    def __init__(self, rule: LocalRule[Any] | None = None, name: str = "") -> None:
        self._rule: LocalRule[Any] = Identity() if rule is None else rule
        self._name = name or type(self._rule).__name__
        missing = [one for one in _METHODS if not callable(getattr(self._rule, one, None))]
        if isinstance(rule, type) or missing:
            what = "is a class; name an instance of it" if isinstance(rule, type) else ""
            told = what or f"has no method '{missing[0]}'"
            raise UsageError(f"the local rule {self._name} {told} (docs/codecs.md)")
        self._at = ("", 0)
        self._kept: list[_Kept] = []

    @property
    def name(self) -> str:
        """What it is called, for people."""
        return self._name

    @property
    def per_example(self) -> bool:
        """Whether it takes the gradient of each example, not that of their mean."""
        return bool(getattr(self._rule, "per_example", False))

    @property
    def changes_nothing(self) -> bool:
        """Whether it is the identity."""
        return isinstance(self._rule, Identity)

    def of_round(self, run: str, number: int) -> None:
        """Say for which round the next training is."""
        self._at = (run, number)

    def begin(self, received: Named) -> Any:
        """Return the state with which a training begins.

        Raises:
            TaskError: if the rule fails; so do the others.
        """
        return self._do("begin", self._rule.begin, received, {}, self._kept_before())

    def gradient(self, gradient: Named, weights: Named, state: Any) -> tuple[dict[str, Any], Any]:
        """Return the gradient to use, and the next state."""
        found = self._do("gradient", self._rule.gradient, gradient, weights, state)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Mapping):
            raise TaskError(
                f"gradient() of the local rule {self._name} returned a {type(found).__name__}; "
                "(gradient, state) is expected"
            )
        changed, state = found
        if changed.keys() != gradient.keys():
            differ = min(changed.keys() ^ gradient.keys(), key=str)
            raise TaskError(
                f"gradient() of the local rule {self._name} returned other tensors than it was "
                f"given: '{differ!s:.60}' is on one side only"
            )
        for name, old in gradient.items():
            shape = np.shape(old)[1:] if self.per_example else np.shape(old)
            if np.shape(changed[name]) != shape:
                raise TaskError(
                    f"gradient() of the local rule {self._name} returned '{name}' of shape "
                    f"{np.shape(changed[name])}, expected {shape}"
                )
        return dict(changed), state

    def end(self, trained: Named, state: Any) -> None:
        """Keep what the rule keeps."""
        found = self._do("end", self._rule.end, trained, state)
        if not isinstance(found, Mapping):
            raise TaskError(
                f"end() of the local rule {self._name} returned a {type(found).__name__}; a "
                "mapping of names to arrays is expected, an empty one to keep nothing"
            )
        kept = _Kept(*self._at, {name: np.array(array) for name, array in found.items()})
        others = [one for one in self._kept if (one.run, one.round) != self._at]
        self._kept = [*others, kept][-_ROUNDS_KEPT:]

    def _kept_before(self) -> Named:
        run, number = self._at
        before = [one for one in self._kept if one.run == run and one.round < number]
        return max(before, key=lambda one: one.round).arrays if before else {}

    def _do(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except TaskError:
            raise
        except Exception as why:
            trace = why.__traceback__  # its first frame is ours
            own = why.with_traceback(trace.tb_next if trace and trace.tb_next else trace)
            raise TaskError(
                f"{what}() of the local rule {self._name} fails: {one_line(own)}"
            ) from own
