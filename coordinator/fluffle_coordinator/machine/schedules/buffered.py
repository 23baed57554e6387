"""Asynchronous federation: every K updates make a version, from whatever version they are.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff), AISTATS 2022,
algorithm 1. Whoever is idle trains the newest version at once, up to a concurrency; so nobody waits
for the slowest, and what the slowest learns still counts, discounted by how many versions were
committed since the one that it began with.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Draw, chosen_by
from fluffle_coordinator.machine.staleness import POLYNOMIAL, Discount
from fluffle_coordinator.machine.state import State


@dataclass(frozen=True)
class Buffered(Schedule[State]):
    """Versions of ``buffer`` updates each.

    Args:
        buffer: how many updates make a version; K in the paper.
        concurrency: how many workers train at a time at most; None: all of them.
        max_staleness: how many versions old an update may be; what is older is discarded.
        phi: what part of its weight a stale one keeps.
    """

    buffer: int = 10
    concurrency: int | None = None
    max_staleness: int = 20
    phi: Discount = POLYNOMIAL

    @property
    def continuous(self) -> bool:
        """Work outlives its version."""
        return True

    def discount(self, staleness: int) -> float:
        """Return what part of its weight an update keeps that is so many versions old."""
        return self.phi(staleness)

    def needed(self, state: State) -> int:
        """Return how many updates make a version."""
        return self.buffer

    def cohort(self, state: State) -> tuple[str, ...]:
        """Choose among the idle workers, as many as the concurrency leaves room for."""
        idle = [name for name in state.workers if name not in state.asked]
        idle = [name for name in idle if name not in state.failed]
        return self._chosen(state, idle)

    def idle(self, state: State, worker: str) -> tuple[str, ...]:
        """Give this worker new work; or where not all can have some, one of the idle."""
        if self.concurrency is None or len(state.workers) <= self.concurrency:
            there = worker in state.workers and worker not in state.failed
            return (worker,) if there else ()
        return self.cohort(state) if state.tally.unfolded < self.concurrency else ()

    def _chosen(self, state: State, idle: list[str]) -> tuple[str, ...]:
        room = len(idle)
        if self.concurrency is not None:
            room = max(0, self.concurrency - state.tally.unfolded)
        rules, candidates = state.rules, state.candidates(idle)
        return chosen_by(rules.selection, candidates, room, Draw(rules.seed, state.sequence))
