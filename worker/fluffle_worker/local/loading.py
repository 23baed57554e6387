"""How a local rule is found and given to a task."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from fluffle_common.cli.objects import load_object
from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.user_code import one_line

GROUP = "fluffle.local_rules"
_OPTION = "--local-rule"


def use_local_rule(task: Any, name: str) -> None:
    """Let a task train by the rule that ``path.py:name``, or an entry point, names.

    Raises:
        UsageError: if there is no such rule, or the task applies none.
        TaskError: if its file fails to load.
    """
    if not isinstance(getattr(task, "local_rule", None), BoundRule):
        raise UsageError(
            f"{_OPTION} {name} is of no use: this task applies no local rules; make it with "
            "flax_task, or call self.local_rule in its train() (docs/codecs.md)"
        )
    task.local_rule = BoundRule(find_rule(name), name)


def find_rule(name: str) -> Any:
    """Return the rule of this name.

    Raises:
        UsageError: if there is none.
        TaskError: if it fails to load.
    """
    if ":" in name:
        return load_object(name, _OPTION)
    installed = {found.name: found for found in entry_points(group=GROUP)}
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise UsageError(
            f"there is no local rule '{name}' installed (installed: {known}); path.py:name names "
            f"one in a file ({_OPTION})"
        )
    try:
        return installed[name].load()
    except Exception as why:
        raise TaskError(f"the local rule '{name}' fails to load: {one_line(why)}") from why
