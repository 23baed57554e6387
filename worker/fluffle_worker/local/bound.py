"""A local rule as a task uses it: checked, its errors in one line, what it keeps kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.weights import Weights
from fluffle_worker.local.base import Identity, LocalRule, Named, ended
from fluffle_worker.local.kept import KeptTensors
from fluffle_worker.user_code import one_line

_METHODS = ("begin", "gradient", "end")
NOTHING: Named = MappingProxyType({})


class BoundRule:
    """A rule, checked.

    A task calls ``begin`` with the weights that it received, ``gradient`` at each step, and ``end``
    with the trained weights. What ``end`` keeps is given to ``begin`` in a later round of the same
    run; a worker keeps it in its state folder too.

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
            raise UsageError(f"the local rule {self._name} {told} (docs/tasks.md)")
        self._at = ("", 0)
        self._broadcast: Named = NOTHING
        self._kept = KeptTensors()
        self.sent: Weights = {}

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

    @property
    def key(self) -> int:
        """What the rule itself is known by: the same for all that are made of it by ``anew``."""
        return id(self._rule)

    def anew(self) -> BoundRule:
        """Return the same rule with nothing kept, for another worker in this process."""
        return BoundRule(self._rule, self._name)

    def keep_in(self, folder: Path) -> None:
        """Keep what the rule keeps in this folder, from where it is read after a restart."""
        self._kept = KeptTensors(folder)

    def of_round(self, run: str, number: int, broadcast: Named = NOTHING) -> None:
        """Say for which round the next training is, and what the strategy broadcasts in it.

        After the training, ``sent`` holds the extra tensors that the rule made.
        """
        self._at, self._broadcast, self.sent = (run, number), broadcast, {}

    def begin(self, received: Named) -> Any:
        """Return the state with which a training begins.

        Raises:
            TaskError: if the rule fails; so do the others.
        """
        kept = self._kept.before(*self._at)
        return self._do("begin", self._rule.begin, received, self._broadcast, kept)

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
        """Keep what the rule keeps, and take what it sends."""
        found = self._do("end", self._rule.end, trained, state)
        kept, extra = ended(found)
        if not isinstance(kept, Mapping) or not isinstance(extra, Mapping):
            raise TaskError(
                f"end() of the local rule {self._name} returned a {type(found).__name__}; a "
                "mapping of names to arrays is expected, an empty one to keep nothing, or "
                "(kept, extra)"
            )
        try:
            self._kept.keep(*self._at, kept)
        except ValueError as wrong:
            raise TaskError(
                f"end() of the local rule {self._name} returned what cannot be kept: {wrong}"
            ) from None
        self.sent = {str(name): np.array(array) for name, array in extra.items()}

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
