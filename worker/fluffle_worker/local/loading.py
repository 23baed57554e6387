"""Lookup of local rules by the name that ``--local-rule`` or a task gives them; their chaining."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluffle_common.arguments import nearest, read_arguments
from fluffle_common.cli.loading import load_installed, load_object
from fluffle_common.errors import UsageError
from fluffle_common.installed import installed
from fluffle_common.user_errors import one_line
from fluffle_worker.local.base import LocalRule, Named, kept_and_extra
from fluffle_worker.local.bound import BoundRule

GROUP = "fluffle.local_rules"
_OPTION = "--local-rule"
_JOIN = re.compile(r"\+(?!\d)")  # not the plus of 1e+3
OWN = {
    "clip": "fluffle_worker.local.clip:Clip",
    "dp_sgd": "fluffle_worker.local.dp_sgd:DpSgd",
    "proximal": "fluffle_worker.local.proximal:Proximal",
    "scaffold": "fluffle_worker.local.scaffold:Scaffold",
}
"""The factories of the built-in rules."""


def use_local_rule(task: Any, name: str) -> None:
    """Set a task's local rule by name; see ``find_rule``.

    Raises:
        UsageError: if there is no such rule, or the task does not apply local rules.
        TaskError: if the rule's file fails to load.
    """
    if not isinstance(getattr(task, "local_rule", None), BoundRule):
        raise UsageError(
            f"{_OPTION} {name} has no effect, because this task applies no local rules; make the "
            "task with flax_task or torch_task, or call self.local_rule in the task's train() "
            "(docs/tasks.md)"
        )
    task.local_rule = bound_rule(name)


def bound_rule(rule: LocalRule[Any] | str | None) -> BoundRule:
    """Return a rule, which may be given by its name, as a task calls it; see ``find_rule``.

    Raises:
        UsageError: if there is no such rule, or it is not a rule.
        TaskError: if the rule's file fails to load.
    """
    return BoundRule(find_rule(rule), rule) if isinstance(rule, str) else BoundRule(rule)


def find_rule(name: str) -> Any:
    """Return the rule with this name.

    Args:
        name: ``NAME``, ``NAME:SETTINGS`` such as ``proximal:0.1`` or ``dp_sgd:clip=1,noise=1.1``,
            ``path.py:name``, or several of these joined by ``+``.

    Raises:
        UsageError: if there is no such rule, or it rejects the settings.
        TaskError: if the rule fails to load.
    """
    parts = _JOIN.split(name)
    if len(parts) == 1 or Path(name.rpartition(":")[0]).is_file():
        return _find_one(name)
    rules = [_find_one(part) for part in parts]
    for rule, part in zip(rules, parts, strict=True):
        BoundRule(rule, part)  # raises if it is not a rule
    return Chain(rules)


def _find_one(name: str) -> Any:
    kind, colon, settings = name.partition(":")
    others = installed(GROUP)
    if kind in OWN:
        rule = pkgutil.resolve_name(OWN[kind])
    elif kind in others:
        rule = load_installed("local rule", others[kind])
    elif name.rpartition(":")[0].endswith(".py"):
        return load_object(name, _OPTION)
    else:
        raise UsageError(
            f"unknown local rule '{kind}' ({_OPTION}); {nearest(kind, {*OWN, *others})} "
            "(path.py:name loads your own rule)"
        )
    if callable(rule):
        return _call_factory(kind, rule, settings)
    if colon:
        raise UsageError(
            f"the local rule '{kind}' takes no settings; remove the settings '{settings}'"
        )
    return rule


def _call_factory(kind: str, factory: Callable[..., Any], settings: str) -> Any:
    """Call a rule's factory with settings given by position or by name."""
    try:
        given = read_arguments(factory, settings, in_order=True)
    except ValueError as wrong:
        names = ",".join(name.upper() for name in inspect.signature(factory).parameters)
        form = f"{kind}:{names}" if names else kind
        raise UsageError(
            f"invalid settings '{settings}' for the local rule '{kind}': {wrong}; expected {form}"
        ) from None
    try:
        return factory(**given)
    except (TypeError, ValueError) as wrong:
        raise UsageError(
            f"the local rule '{kind}' rejects the settings '{settings}': {one_line(wrong)}"
        ) from wrong


class Chain:
    """A rule that passes each gradient through several rules, in order.

    The arrays that a rule keeps have its index as a prefix of their names.

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
        states = []
        for number, rule in enumerate(self._rules):
            own = {}
            for name, array in kept.items():
                index, _, rest = name.partition("/")
                if index == str(number):
                    own[rest] = array
            states.append(rule.begin(received, broadcast, own))
        return states

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
