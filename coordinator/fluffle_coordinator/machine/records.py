"""The small records that the events, the effects and the state are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fluffle_common.protocol.messages import ModelForm
from fluffle_coordinator.machine.rules import Rules

Outcome = Literal["finished", "stopped"]


class Handle(NamedTuple):
    """A delivery: the link it came over (counted from 1) and its number on that link."""

    link: int
    number: int


class Ticket(NamedTuple):
    """The identity of a piece of a worker's work, which its update brings back."""

    worker: str
    sequence: int


@dataclass(frozen=True)
class Worker:
    """A connected worker, as its hello and its heartbeats describe it."""

    name: str
    session: str
    num_examples: int
    classes: tuple[str, ...]
    heartbeat_s: float
    last_seen: float
    state: str = "idle"
    run: str | None = None
    round: int = 0
    base: str | None = None
    sequence: int | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    incomplete_bytes: int | None = None  # of messages that are arriving
    model: ModelForm | None = None
    features: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # the digests of the frozen tensors that it holds
    joined_at: float = 0.0  # when this process was first heard
    moved_at: float = 0.0  # when its position last changed
    received_at: float = -math.inf  # when more of an incomplete message had last arrived
    stalled: bool = False  # whether it was reported as stalled
    failed_round: int = 0  # the last of which a failure was only reported

    def deadline(self, rules: Rules) -> float:
        """Return when it counts as gone unless it sends another heartbeat."""
        return self.last_seen + rules.patience * self.heartbeat_s

    @property
    def position(self) -> tuple[object, ...]:
        """Where its work stands: the worker advances whenever this changes."""
        return self.session, self.state, self.run, self.round, self.sequence, self.base, self.step

    @property
    def has_steps(self) -> bool:
        """Whether its current work advances in steps."""
        return self.steps > 0 and self.state in ("receiving", "training", "sending")

    def stall_s(self, rules: Rules) -> float:
        """Return how long its current work may stand still before it is reported as stalled.

        A training without steps may still be loading its data. So long as a broker does not accept
        an update that is one message, nothing has stalled.
        """
        if self.has_steps:
            return rules.stall_s
        at_work = self.state in ("training", "evaluating")
        return rules.stall_without_steps_s if at_work else math.inf


@dataclass(frozen=True)
class Evaluated:
    """One worker's evaluation of a model."""

    num_examples: int
    loss: float
    metrics: Mapping[str, float]
