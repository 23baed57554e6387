"""Asynchronous rounds: every K updates make a version, whichever version they started from.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff), AISTATS 2022,
algorithm 1. An idle worker gets the newest version at once, up to a concurrency. So no worker waits
for the slowest one, whose update still counts, discounted by its staleness.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluffle_common.arguments import write_arguments
from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Draw
from fluffle_coordinator.machine.staleness import POLYNOMIAL, Discount
from fluffle_coordinator.machine.state import State


@dataclass(frozen=True)
class Buffered(Schedule[State]):
    """Versions of ``buffer`` updates each."""

    buffer: int = 10  # how many updates make a version; K in the paper
    concurrency: int | None = None  # the most workers that train at a time; None sets no limit
    max_staleness: int = 20  # how many versions old an update may be; older ones are discarded
    phi: Discount = POLYNOMIAL  # of a stale update

    def __str__(self) -> str:
        """Return the name, with all settings."""
        settings: dict[str, object] = {"buffer": self.buffer, "concurrency": self.concurrency}
        settings |= {"max_staleness": self.max_staleness, "staleness": self.phi}
        return f"buffered:{write_arguments(settings)}"

    @property
    def continuous(self) -> bool:
        """True: work outlives its version."""
        return True

    def discount(self, staleness: int) -> float:
        """Return the factor on the weight of an update that is so many versions old."""
        return self.phi(staleness)

    def needed(self, state: State) -> int:
        """Return how many updates make a version."""
        return self.buffer

    def cohort(self, state: State) -> tuple[str, ...]:
        """Select idle workers, as many as the concurrency leaves room for."""
        idle = [n for n in state.workers if n not in state.asked and n not in state.failed]
        room = len(idle)
        if self.concurrency is not None:
            room = max(0, self.concurrency - state.tally.unfolded)
        return state.select(idle, room, Draw(state.rules.seed, state.sequence))

    def idle(self, state: State, worker: str) -> tuple[str, ...]:
        """Return this worker; if the concurrency is limited, any idle ones that it has room for."""
        if self.concurrency is None or len(state.workers) <= self.concurrency:
            return (worker,) if worker in state.workers else ()
        return self.cohort(state) if state.tally.unfolded < self.concurrency else ()
