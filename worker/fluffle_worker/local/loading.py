"""How a local rule is found and given to a task."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fluffle_common.cli.objects import load_object
from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.chain import Chain
from fluffle_worker.user_code import one_line

GROUP = "fluffle.local_rules"
_OPTION = "--local-rule"
_JOIN = re.compile(r"\+(?!\d)")  # not the plus of 1e+3
OWN = {
    "clip": "fluffle_worker.local.clip:Clip",
    "dp_sgd": "fluffle_worker.local.dp_sgd:DpSgd",
    "proximal": "fluffle_worker.local.proximal:Proximal",
    "scaffold": "fluffle_worker.local.scaffold:Scaffold",
}
"""fluffle's own rules: what makes each, of its settings."""


def use_local_rule(task: Any, name: str) -> None:
    """Let a task train by the rule of this name; see ``find_rule``.

    Raises:
        UsageError: if there is no such rule, or the task applies none.
        TaskError: if its file fails to load.
    """
    if not isinstance(getattr(task, "local_rule", None), BoundRule):
        raise UsageError(
            f"{_OPTION} {name} has no effect: this task applies no local rules; make it with "
            "flax_task, or call self.local_rule in its train() (docs/tasks.md)"
        )
    task.local_rule = BoundRule(find_rule(name), name)


def find_rule(name: str) -> Any:
    """Return the rule of this name.

    Args:
        name: ``NAME``, ``NAME:SETTINGS`` such as ``proximal:0.1`` or ``dp_sgd:clip=1,noise=1.1``,
            ``path.py:name``, or several of these with a ``+`` between them.

    Raises:
        UsageError: if there is none, or it does not take these settings.
        TaskError: if it fails to load.
    """
    parts = _JOIN.split(name)
    if len(parts) == 1 or Path(name.rpartition(":")[0]).is_file():
        return _find_one(name)
    rules = [_find_one(part) for part in parts]
    for rule, part in zip(rules, parts, strict=True):
        BoundRule(rule, part)  # which says what it lacks
    return Chain(rules)


def _find_one(name: str) -> Any:
    called, colon, settings = name.partition(":")
    installed = {found.name: found for found in entry_points(group=GROUP)}
    if called in OWN:
        module, _, attribute = OWN[called].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    elif called in installed:
        try:
            found = installed[called].load()
        except Exception as why:
            raise TaskError(f"the local rule '{called}' fails to load: {one_line(why)}") from why
    elif name.rpartition(":")[0].endswith(".py"):
        return load_object(name, _OPTION)
    else:
        known = sorted({*OWN, *installed})
        near = difflib.get_close_matches(called, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"there is no local rule '{called}' ({_OPTION}); {hint}known are {', '.join(known)}, "
            "and path.py:name takes one from a file"
        )
    if callable(found):
        return _made(called, found, settings)
    if colon:
        raise UsageError(f"the local rule '{called}' takes no settings, not '{settings}'")
    return found


def _made(called: str, make: Callable[..., Any], settings: str) -> Any:
    """Make a rule of its settings: numbers, in their order or by their names."""
    names = list(inspect.signature(make).parameters)
    given: dict[str, float] = {}
    for position, part in enumerate(settings.split(",") if settings else []):
        label, equals, text = part.strip().rpartition("=")
        if not equals:
            label = names[position] if position < len(names) else ""
        if label not in names or label in given:
            raise UsageError(_expected(called, names, settings, label if equals else ""))
        try:
            given[label] = float(text)
        except ValueError:
            raise UsageError(
                f"'{label}' of the local rule '{called}' is '{text}'; a number is expected"
            ) from None
    if len(given) < len(names):
        raise UsageError(_expected(called, names, settings))
    try:
        return make(**given)
    except (TypeError, ValueError) as wrong:
        raise UsageError(
            f"the local rule '{called}' refuses '{settings}': {one_line(wrong)}"
        ) from wrong


def _expected(called: str, names: list[str], settings: str, unknown: str = "") -> str:
    form = f"{called}:{','.join(name.upper() for name in names)}" if names else called
    near = difflib.get_close_matches(unknown, names, n=1) if unknown else []
    hint = f"; did you mean {near[0]}=?" if near else ""
    return f"the local rule '{called}' has the settings '{settings}'; expected is {form}{hint}"
