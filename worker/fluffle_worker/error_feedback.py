"""What a worker has learnt and not sent: carried from one round to the next, never twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fluffle_common.tensors.weights import Array
from fluffle_worker.machine import Work


@dataclass(frozen=True)
class Residual:
    """What an encoded update left unsent.

    It goes into the next update of the same run that is sent, and is replaced by what that one
    leaves. It is kept in memory only: a worker that is started again begins without.

    Args:
        work: whose update left it; None where there is none yet.
        tensors: ``delta + what was left before - sent``; empty where nothing is left.
    """

    work: Work | None = None
    tensors: Mapping[str, Array] = field(default_factory=dict)

    def before(self, work: Work) -> Mapping[str, Array]:
        """Return what goes into this work's update.

        That is nothing in another run, and nothing where the residual is of this work or a later
        one: work that is done again after its update was sent, as after a coordinator went back to
        an earlier checkpoint, would take what is in that update already.
        """
        if self.work is None or self.work.run != work.run:
            return {}
        if (self.work.round, self.work.sequence) >= (work.round, work.sequence):
            return {}
        return self.tensors
