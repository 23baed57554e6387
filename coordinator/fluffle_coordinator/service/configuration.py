"""What a run is configured with, as run.json keeps it for whoever looks at the run afterwards."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluffle_common.protocol.topology import Topology
    from fluffle_coordinator.service.settings import CoordinatorSettings


def configuration(settings: CoordinatorSettings, topology: Topology) -> dict[str, Any]:
    """Return everything that was decided about a run, and the versions it runs on.

    The broker's address is left out: it may hold a password, and says nothing about the result.
    """
    named, rules = settings.strategy, asdict(settings.rules)
    del rules["secret"]
    return {
        "rules": {**rules, "selection": settings.rules.selection.name},
        # Without what the rules and the strategy decide.
        "plan": settings.plan.model_dump(exclude={"seed", "deadline_s", "extra"}),
        "learning_rate_schedule": str(settings.learning_rate_schedule),
        "strategy": named.name,
        **({"strategy_file": named.file} if named.file else {}),
        "schedule": settings.schedule_name,
        "classes": settings.classes,
        "init": None if settings.init is None else str(settings.init),
        "verify_users": settings.verify_users,
        "keep_updates": settings.keep_updates,
        **settings.hooks.names(),
        "stopping": asdict(settings.stopping),
        "queue_type": topology.queue_type,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that bear on what comes out, by name."""
    names = ("fluffle", "numpy", "ml-dtypes", "aio-pika", "msgpack", "pydantic", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
