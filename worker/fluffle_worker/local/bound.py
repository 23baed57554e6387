"""A local rule as a task calls it: with checked results and persistent state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.weights import Weights, read_only
from fluffle_common.user_errors import one_line
from fluffle_worker.local.base import LocalRule, Named, Plain, kept_and_extra
from fluffle_worker.local.persistent_tensors import PersistentTensors, WorkId


class BoundRule:
    """A wrapper around a user's rule that checks its results and keeps its arrays.

    A task calls ``begin`` with the received weights, ``gradient`` at each step, and ``end`` with
    the trained weights. The arrays that ``end`` keeps are passed to ``begin`` in the next round of
    the same run. Every method raises ``TaskError`` if the rule fails or returns something invalid.

    Args:
        rule: the rule; None if there is none.
        name: the rule's name in errors; by default, that of its class.

    Raises:
        UsageError: if ``rule`` is a class or lacks a method.
    """

    def __init__(self, rule: LocalRule[Any] | None = None, name: str = "") -> None:
        self._rule: LocalRule[Any] = Plain() if rule is None else rule
        self.name = name or type(self._rule).__name__
        if isinstance(rule, type):
            raise UsageError(
                f"the local rule {self.name} is a class; create an object of the class, and give "
                "this object instead of the class (docs/tasks.md)"
            )
        for method in ("begin", "gradient", "end"):
            if not callable(getattr(self._rule, method, None)):
                raise UsageError(
                    f"the local rule {self.name} has no method '{method}'; add the method "
                    "(docs/tasks.md)"
                )
        self._work: WorkId = ("", 0, 0)
        self._broadcast: Named = {}
        self._kept = PersistentTensors()
        self.sent: Weights = {}

    @property
    def per_example(self) -> bool:
        """Whether the rule receives the gradient of each example instead of their mean."""
        return bool(getattr(self._rule, "per_example", False))

    def check_batches(self, *, mixed: bool) -> None:
        """Check that the rule can have the gradients that it needs.

        ``mixed`` says whether the model mixes the examples of a batch, as batch normalization does.

        Raises:
            TaskError: if the rule needs the gradient of each example, but ``mixed``.
        """
        if self.per_example and mixed:
            raise TaskError(
                f"the local rule {self.name} needs the gradient of each example, but batch "
                "normalization mixes the examples of a batch; use layer or group normalization"
            )

    def check_statistics(self, changed: Iterable[str]) -> None:
        """Check that no tensor leaves without the noise that such a rule adds to gradients.

        ``changed`` are the tensors to send that training has changed although they have no
        gradient.

        Raises:
            TaskError: if there are some, and the rule needs the gradient of each example.
        """
        if self.per_example and (name := min(changed, default="")):
            raise TaskError(
                f"the local rule {self.name} changes only gradients, but training also changes "
                f"'{name:.100}', which has no gradient and would be sent as it is; keep this "
                "tensor with the worker (federated=), or freeze it (frozen=)"
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether there is no rule."""
        return type(self._rule) is Plain

    @property
    def key(self) -> int:
        """Identifies the wrapped rule, for caches; wrappers made by ``anew`` share it."""
        return id(self._rule)

    @property
    def run(self) -> str:
        """The id of the run of the current work; empty if it is not known."""
        return self._work[0]

    def anew(self) -> BoundRule:
        """Return a wrapper of the same rule with no kept arrays, for another worker."""
        return BoundRule(self._rule, self.name)

    def keep_in(self, folder: Path) -> None:
        """Keep the rule's arrays in this folder, so that they outlive a restart."""
        self._kept = PersistentTensors(folder)

    def of_work(self, work: WorkId, broadcast: Named = MappingProxyType({})) -> None:
        """Set the next work, and the extra tensors that the strategy sent for it.

        After the training, ``sent`` holds the extra tensors that the rule returned.
        """
        self._work, self._broadcast, self.sent = work, broadcast, {}

    def begin(self, received: Named) -> Any:
        """Return the initial state of a training."""
        kept = self._kept.before(self._work)
        given = [_protected(arrays) for arrays in (received, self._broadcast, kept)]
        return self._call("begin", self._rule.begin, *given)

    def gradient(self, gradient: Named, weights: Named, state: Any) -> tuple[dict[str, Any], Any]:
        """Return the gradient to use, and the next state."""
        result = self._call("gradient", self._rule.gradient, gradient, weights, state)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Mapping):
            raise TaskError(
                f"gradient() of the local rule {self.name} returned a {type(result).__name__}; "
                "expected a pair (gradient, state)"
            )
        changed, state = result
        if changed.keys() != gradient.keys():
            differ = min(changed.keys() ^ gradient.keys(), key=str)
            side = "input" if differ in gradient else "output"
            raise TaskError(
                f"gradient() of the local rule {self.name} must return tensors with the same "
                f"names as it receives, but the tensor '{differ!s:.60}' is only in its {side}"
            )
        for name, old in gradient.items():
            shape = np.shape(old)[1:] if self.per_example else np.shape(old)
            if np.shape(changed[name]) != shape:
                raise TaskError(
                    f"gradient() of the local rule {self.name} returned the tensor '{name}' with "
                    f"the shape {np.shape(changed[name])}; expected the shape {shape}"
                )
        return dict(changed), state

    def end(self, trained: Named, state: Any) -> None:
        """Keep the arrays to keep, and set ``sent`` to the extra tensors."""
        result = self._call("end", self._rule.end, _protected(trained), state)
        kept, extra = kept_and_extra(result)
        if not isinstance(kept, Mapping) or not isinstance(extra, Mapping):
            raise TaskError(
                f"end() of the local rule {self.name} returned a {type(result).__name__}; "
                "expected a mapping of names to arrays, or a pair (kept, extra) of two mappings"
            )
        try:
            self._kept.keep(self._work, kept)
        except ValueError as wrong:
            raise TaskError(
                f"end() of the local rule {self.name} returned arrays that cannot be kept: {wrong}"
            ) from None
        self.sent = {str(name): np.array(array) for name, array in extra.items()}

    def _call(self, method: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except TaskError:
            raise
        except Exception as why:
            trace = why.__traceback__  # without its first frame, which is this one
            own = why.with_traceback(trace.tb_next if trace and trace.tb_next else trace)
            raise TaskError(
                f"{method}() of the local rule {self.name} fails: {one_line(own)}"
            ) from own


def _protected(arrays: Named) -> Named:
    """Return read-only views of NumPy arrays, so that a rule cannot shift the model in place."""
    return {
        name: read_only(array) if isinstance(array, np.ndarray) else array
        for name, array in arrays.items()
    }
