"""The state of a run as its folder has it: what a coordinator goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluffle_common.tensors.frozen import NO_FROZEN, Frozen
from fluffle_common.tensors.weights import Array
from fluffle_coordinator.machine.records import Ticket
from fluffle_coordinator.strategy.fedavg import FEDAVG


@dataclass(frozen=True)
class Saved:
    """The state of a run on disk; the defaults are those of a new run."""

    run: str  # its id
    lines: Sequence[Mapping[str, Any]] = ()  # of its history
    committed: int = 0  # the last committed round; 0 for none
    # The largest number of examples that each worker was counted with.
    announced: Mapping[str, int] = field(default_factory=dict)
    counted: Mapping[int, frozenset[Ticket]] = field(default_factory=dict)  # in each round
    # The name of the weights that each round began with.
    earlier: Mapping[int, str] = field(default_factory=dict)
    asked_in: Mapping[str, int] = field(default_factory=dict)  # the last round of each worker
    train_s: Mapping[str, float] = field(default_factory=dict)  # each worker's last training time
    median_norms: tuple[float, ...] = ()  # of the updates of each of the last rounds
    evaluated: bool = True  # whether the last model's evaluation is in the history
    weights: dict[str, Array] | None = None  # of the last model; None if there is none yet
    metadata: dict[str, str] = field(default_factory=dict)  # of its checkpoint
    repairs: tuple[str, ...] = ()  # descriptions of what was repaired
    strategy: str = FEDAVG.name  # the one that made the last model
    kept: Mapping[str, Array] = field(default_factory=dict)  # the state that it saved with that
    frozen: Frozen = NO_FROZEN  # the frozen tensors of the model

    @property
    def base(self) -> str:
        """The name of the weights; empty if there are none yet."""
        return self.metadata.get("base", "")
