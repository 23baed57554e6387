"""What the operator decides of a coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fluffle_common.protocol.messages import Plan
from fluffle_common.transport.reconnect import Backoff
from fluffle_coordinator.machine import state as rs
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.schedules.quorum import QUORUM
from fluffle_coordinator.service.hooks import NO_HOOKS, Hooks
from fluffle_coordinator.service.learning_rate import CONSTANT, LearningRateSchedule
from fluffle_coordinator.service.stopping import NO_STOPPING, Stopping
from fluffle_coordinator.strategy.base import NamedStrategy
from fluffle_coordinator.strategy.fedavg import FEDAVG


@dataclass(frozen=True)
class CoordinatorSettings:
    """What the operator decided, besides the rules of the rounds.

    Args:
        federation: whose queues to use.
        rules: the rules of the rounds.
        plan: what workers are told about training; ``whole_plan`` adds what is decided elsewhere.
        learning_rate_schedule: how the plan's learning rate changes from round to round.
        strategy: how a round is averaged.
        schedule: how rounds follow each other.
        schedule_name: what that is called, with its settings.
        classes: the classes that workers must have; None lets the first worker say.
        init: a checkpoint to begin with; None asks a worker.
        max_workers: the most updates that may be held unacknowledged, give or take a few; where
            more workers answer, the next round's wait until those of the last are on disk.
        max_held_bytes: how much of the updates may wait to be folded; see ``held_updates``.
        max_model_bytes: the most that a model or an update may have.
        verify_users: reject what a worker sends while logged in to the broker under another name
            than its id.
        keep_updates: keep every update that is counted, as it came.
        hooks: what is called after each commit.
        stopping: when the run has done enough, before all of its rounds.
        backoff: how to wait for a broker that is away.
        waiting_every_s: how often to say what is waited for.
    """

    federation: str
    rules: rs.Rules
    plan: Plan = field(default_factory=Plan)
    learning_rate_schedule: LearningRateSchedule = CONSTANT
    strategy: NamedStrategy = FEDAVG
    schedule: Schedule[rs.State] = QUORUM
    schedule_name: str = "quorum"
    classes: tuple[str, ...] | None = None
    init: Path | None = None
    max_workers: int = 1024
    max_held_bytes: int = 2**30
    max_model_bytes: int = 8 * 2**30
    verify_users: bool = False
    keep_updates: bool = False
    hooks: Hooks = NO_HOOKS
    stopping: Stopping = NO_STOPPING
    backoff: Backoff = field(default_factory=Backoff)
    waiting_every_s: float = 10.0

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
