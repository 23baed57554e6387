"""Turns the keywords of ``fluffle.run`` and ``fluffle.simulate`` into a coordinator's settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fluffle_common.cli.config_file import options_from
from fluffle_common.errors import FluffleError, UsageError
from fluffle_coordinator.cli.coordinator import coordinator
from fluffle_coordinator.cli.schedule_options import SYNCHRONOUS_ONLY
from fluffle_coordinator.service.app import settings_of
from fluffle_coordinator.service.settings import CoordinatorSettings

_UNAVAILABLE = {
    "run": "use folder= for the run folder",
    "log_format": "use progress= to choose what is shown",
    "dashboard": "use 'fluffle dashboard' for a run over RabbitMQ, or 'fluffle report' afterwards",
    "management": "remove management=, which only the live page needs",
    "local_rule": "give local_rule= to flax_task or torch_task",
}
# An option in the text of an error, but not in the command lines in it, which are quoted.
_OPTION = re.compile(r"'fluffle [^']*'|(?<![\w-])--[a-z][a-z-]*")
# An in-memory broker loses what it holds.
_AGAIN = re.compile(r"run the same command again( \(no update is lost\))?")
_KEYWORDS = {
    **{
        flag: f"{flag.removeprefix('--').replace('-', '_')}="
        for option in coordinator.params
        for flag in option.opts
    },
    "--data": "the task's data",
    "--id": "key in tasks",
    "--local-rule": "local_rule=",  # of flax_task
    "--run": "folder=",
    "--state-dir": "folder=",
}


def with_keywords(text: str) -> str:
    """Name keywords instead of options in a text: ``quorum=`` instead of ``--quorum``."""
    text = _AGAIN.sub("repeat the call", text)
    return _OPTION.sub(lambda found: _KEYWORDS.get(found[0], found[0]), text)


@contextmanager
def as_keywords() -> Iterator[None]:
    """Name keywords instead of options in errors."""
    try:
        yield
    except FluffleError as why:
        why.args = (with_keywords(str(why)),)
        raise


def settings_from(
    caller: str,
    keywords: Mapping[str, Any],
    *,
    workers: int,
    strategy: Any = None,
    evaluate: Any = None,
    on_round: Any = None,
) -> tuple[CoordinatorSettings, dict[str, Any]]:
    """Return the settings of a run, and all options of ``fluffle coordinator`` with their values.

    ``caller`` is the function that was called, for errors. ``keywords`` are options by name, with
    underscores; None means the default. By default, the run starts when as many workers are
    connected as there are tasks, ``workers``.

    Raises:
        UsageError: if a keyword is unknown, does not apply, or has an invalid value, or there are
            too few tasks for the strategy.
        TaskError: if the file of a strategy or a hook fails to load.
    """
    for name, why in _UNAVAILABLE.items():
        if keywords.get(name):
            raise UsageError(f"{caller}() has no {name}=; {why}")
    if keywords.get("verify_users") and keywords.get("url") is None:
        raise UsageError(
            f"{caller}(): verify_users= needs url=, because the in-memory broker has no users; "
            "give url=, or remove verify_users="
        )
    options = options_from(coordinator, keywords, caller)
    if options["schedule"] == "buffered":
        for name in SYNCHRONOUS_ONLY:
            if keywords.get(name) is not None:
                raise UsageError(
                    f"{caller}(): {name}= has no effect with schedule='buffered', because that "
                    "schedule has no synchronous rounds; use buffer= and concurrency= instead"
                )
    if workers and options["min_workers"] is None:
        options["min_workers"] = max(workers, options["quorum"].number or 1)
    options |= {"evaluate": evaluate, "on_round": on_round}
    if strategy is not None:
        options["strategy"] = strategy
    settings = settings_of(options)
    in_memory = workers and keywords.get("url") is None  # nobody else can join
    if in_memory and (short := settings.needing_more(workers)):
        name, given, number = short[0]
        raise UsageError(
            f"{caller}(): {name} = {given} needs at least {number} workers, but the number of "
            f"tasks is {workers}; give more tasks, or change {name}="
        )
    return settings, options
