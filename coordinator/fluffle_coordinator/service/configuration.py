"""The configuration of a run as ``run.json`` stores it."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fluffle_common.protocol.topology import Topology
from fluffle_coordinator.service.settings import CoordinatorSettings

# The packages that can affect the result or the files of a run.
_PACKAGES = ("fluffle", "numpy", "ml-dtypes", "aio-pika", "msgpack", "pydantic", "safetensors")


def configuration(settings: CoordinatorSettings, topology: Topology) -> dict[str, Any]:
    """Return a run's settings and the versions of the software, ready for JSON.

    The broker's address is left out: it may contain a password and does not affect the result. So
    is the sampling secret.
    """
    named, rules = settings.strategy, asdict(settings.rules)
    del rules["secret"]
    return {
        "rules": {**rules, "selection": settings.rules.selection.name},
        # The excluded fields repeat the rules and the strategy.
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
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    }
