"""The state of a run as its folder has it: what a coordinator goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fluffle_common.tensors.frozen import NO_FROZEN, Frozen
from fluffle_common.tensors.weights import Array
from fluffle_coordinator.machine.records import Ticket
from fluffle_coordinator.strategy.fedavg import FEDAVG


@dataclass(frozen=True)
class Saved:
    """The state of a run on disk; the defaults are those of a new run.

    Args:
        run: the run's id.
        committed: the last committed round; 0 for none.
        announced: the largest number of examples that each worker was counted with.
        counted: the tickets of each round.
        sequence: the highest sequence in these tickets.
        earlier: the name of the weights that each round began with.
        asked_in: the last round that each worker was asked in.
        train_s: the seconds that each worker's last training took.
        median_norms: the median norm of the updates of each of the last rounds.
        evaluated: whether the last model's evaluation is in the history.
        weights: the last model; None if there are no weights yet.
        metadata: of its checkpoint.
        repairs: descriptions of what was repaired.
        strategy: the name of the strategy that made the last model.
        kept: the state that this strategy saved with it.
        frozen: the frozen tensors of the model.
    """

    run: str
    committed: int = 0
    announced: Mapping[str, int] = field(default_factory=dict)
    counted: Mapping[int, frozenset[Ticket]] = field(default_factory=dict)
    sequence: int = 0
    earlier: Mapping[int, str] = field(default_factory=dict)
    asked_in: Mapping[str, int] = field(default_factory=dict)
    train_s: Mapping[str, float] = field(default_factory=dict)
    median_norms: tuple[float, ...] = ()
    evaluated: bool = True
    weights: dict[str, Array] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    strategy: str = FEDAVG.name
    kept: Mapping[str, Array] = field(default_factory=dict)
    frozen: Frozen = NO_FROZEN

    @property
    def base(self) -> str:
        """The name of the weights; checkpoints of early versions of fluffle have none."""
        return self.metadata.get("base", "unnamed")
