"""The interface of a schedule: who gets work, what a stale update weighs, when a round closes.

A run is a sequence of versions of the model, one per round. A schedule is a frozen object of pure
functions of the machine's state. The machine does everything else, alike for all schedules: it
counts each update once, acknowledges it when its version is on disk, and handles redelivery,
deadlines and lost workers. ``closing`` applies the schedule's ``needed`` and ``closes``.

A class that inherits from ``Schedule`` has the defaults of synchronous rounds. Fluffle comes with
``schedules.quorum`` and ``schedules.buffered``.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

S_contra = TypeVar("S_contra", contravariant=True)


class Schedule(Protocol[S_contra]):
    """The rule for when versions are made; ``S_contra`` is the machine's ``State``."""

    @property
    def max_staleness(self) -> int:
        """How many versions old an update may be to count; 0 for the open version only."""
        return 0

    @property
    def continuous(self) -> bool:
        """Whether work outlives its version, and a worker gets new work after each update."""
        return False

    def discount(self, staleness: int) -> float:
        """Return the factor on the weight of an update that is so many versions old.

        0 makes it late. Unless ``continuous``, updates of the open version are not discounted.
        """
        return 1.0

    def needed(self, state: S_contra) -> int:
        """Return how many updates the open version needs; 0 only if it asks nobody."""

    def cohort(self, state: S_contra) -> tuple[str, ...]:
        """Return the workers present that get work when the version opens.

        In a ``continuous`` schedule, those that are still at work are in ``state.asked``.
        """

    def again(self, state: S_contra) -> tuple[str, ...]:
        """Return the workers that get work when the version is reopened after its deadline.

        Workers whose update has arrived stay in the version in any case.
        """
        return self.cohort(state)

    def idle(self, state: S_contra, worker: str) -> tuple[str, ...]:
        """Return the workers that get work because this worker is idle while the version is open.

        It has joined, it was not asked, or (if ``continuous``) its update was counted.
        """
        return ()

    def closes(self, state: S_contra, now: float) -> bool:
        """Whether to close the version now; asked once ``needed`` updates are in its sum."""
        return True

    def wakeup(self, state: S_contra) -> float:
        """Return when time alone may change what ``closes`` returns; infinity if it does not."""
        return math.inf
