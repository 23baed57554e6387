"""What a schedule decides of a run: who gets work, what an older update is worth, when to close.

A run is a sequence of versions of the model, one a round. A schedule is a frozen object of pure
functions of the machine's state: no IO, no clock, no arrays. Everything else is the machine's and
the same for all of them: an update is counted once and acknowledged when its version is on disk,
redelivery, deadlines, who counts as gone, standby.

A class that inherits from ``Schedule`` has the defaults of synchronous rounds that ask nobody
twice; ``schedules.quorum`` and ``schedules.buffered`` are the two that fluffle brings.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

S_contra = TypeVar("S_contra", contravariant=True)


class Schedule(Protocol[S_contra]):
    """How the versions of a run follow each other; ``S_contra`` is the machine's ``State``."""

    @property
    def max_staleness(self) -> int:
        """How many versions old an update may be that counts; 0: of the open version only."""
        return 0

    @property
    def continuous(self) -> bool:
        """Whether work outlives its version, and a worker whose update counts gets new work."""
        return False

    def discount(self, staleness: int) -> float:
        """Return what part of its weight an update keeps that is so many versions old.

        0 says that it is too late. It is not asked for updates of the open version, whose part is 1
        unless ``continuous``.
        """
        return 1.0

    def needed(self, state: S_contra) -> int:
        """Return how many updates close the open version; 0 only if it asks nobody."""

    def cohort(self, state: S_contra) -> tuple[str, ...]:
        """Return which of the workers present get work as the version opens.

        Those that are still at work, which happens in a ``continuous`` schedule only, are in
        ``state.asked``.
        """

    def again(self, state: S_contra) -> tuple[str, ...]:
        """Return whom the version is asked of when it is opened again, after its deadline.

        Those whose updates are there are in it anyway.
        """
        return self.cohort(state)

    def idle(self, state: S_contra, worker: str) -> tuple[str, ...]:
        """Return who gets work now that this worker has none and the version is open.

        It has joined, or its update was counted (``continuous``), or it was not asked.
        """
        return ()

    def closes(self, state: S_contra, now: float) -> bool:
        """Whether to close the version now; only asked when ``needed`` updates are there."""
        return True

    def wakeup(self, state: S_contra) -> float:
        """Return when ``closes`` may change its mind by time alone; infinity if it does not."""
        return math.inf
