"""The settings of a coordinator."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fluffle_common.protocol.messages import Plan
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.reconnect import Backoff
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.service.early_stopping import NO_STOPPING, Stopping
from fluffle_coordinator.service.learning_rate import CONSTANT, LearningRateSchedule
from fluffle_coordinator.strategy.base import NamedStrategy
from fluffle_coordinator.strategy.fedavg import FEDAVG
from fluffle_coordinator.user_code.hooks import Hooks

# The packages that can affect the result or the files of a run.
_PACKAGES = ("fluffle", "numpy", "ml-dtypes", "aio-pika", "msgpack", "pydantic", "safetensors")


@dataclass(frozen=True)
class CoordinatorSettings:
    """The operator's decisions about a run and its process."""

    federation: str
    rules: rs.Rules
    plan: Plan = field(default_factory=Plan)  # ``whole_plan`` adds what is decided elsewhere
    learning_rate_schedule: LearningRateSchedule = CONSTANT
    strategy: NamedStrategy = FEDAVG
    schedule: Schedule[rs.State] = QUORUM
    classes: tuple[str, ...] | None = None  # None takes those of the majority of the workers
    init: Path | None = None  # a checkpoint to begin with; None asks a worker for first weights
    # The approximate limit of unacknowledged updates. If more workers answer, the broker delivers
    # the rest once a round is on disk, so a round that needs more updates never reaches its quorum.
    # AMQP allows no more than 65,535.
    max_workers: int = 65_000
    verify_users: bool = False  # reject messages whose broker user differs from the worker's id
    keep_checkpoints: int | None = None  # the newest rounds' checkpoints that stay; None: all
    keep_updates: bool = False  # store every counted update as it arrived
    hooks: Hooks = field(default_factory=Hooks)
    stopping: Stopping = NO_STOPPING
    backoff: Backoff = field(default_factory=Backoff)  # while the broker is unreachable
    waiting_every_s: float = 10.0  # between two reports of what the run waits for

    @property
    def whole_plan(self) -> Plan:
        """The plan, with the rules' seed and deadline and the strategy's extra tensors."""
        return self.plan.model_copy(
            update={
                "seed": self.rules.seed,
                "deadline_s": self.rules.deadline_s,
                "extra": self.strategy.strategy.needs.extra,
            }
        )

    def needing_more(self, workers: int) -> list[tuple[str, Any, int]]:
        """Return the settings that need more workers: name, value, and how many they need."""
        rules, named = self.rules, self.strategy
        needs = (
            ("quorum", rules.quorum.number, rules.quorum.number or 0),
            ("strategy", named.name, named.strategy.needs.min_updates),
            ("min_workers", rules.min_workers, rules.min_workers),
            ("fraction", rules.fraction, rules.fewest_present),
        )
        return [need for need in needs if need[2] > workers]

    def configuration(self, topology: Topology) -> dict[str, Any]:
        """Return the settings and the versions of the software for ``run.json``, ready for JSON.

        The broker's address is left out: it may contain a password and does not affect the result.
        So is the sampling secret.
        """
        named, rules = self.strategy, asdict(self.rules)
        del rules["secret"]
        return {
            "rules": {**rules, "selection": self.rules.selection.name},
            # The excluded fields repeat the rules and the strategy.
            "plan": self.plan.model_dump(exclude={"seed", "deadline_s", "extra"}),
            "learning_rate_schedule": str(self.learning_rate_schedule),
            "strategy": named.name,
            **({"strategy_file": named.file} if named.file else {}),
            "schedule": str(self.schedule),
            "classes": self.classes,
            "init": None if self.init is None else str(self.init),
            "verify_users": self.verify_users,
            "keep_checkpoints": self.keep_checkpoints,
            "keep_updates": self.keep_updates,
            **self.hooks.names(),
            "stopping": asdict(self.stopping),
            "queue_type": topology.queue_type,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in _PACKAGES},
        }
