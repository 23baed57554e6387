"""Error feedback: what a codec left out of one update is added to the next, once.

``fluffle_common.tensors.compression`` has the arithmetic and its sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from fluffle_common.tensors.weights import Array
from fluffle_worker.machine import Work


class Residual(NamedTuple):
    """The difference between what an update should have carried and what its codec sent.

    It is added to the next update of the same run, whose own residual replaces it. It is kept in
    memory only: a restarted worker begins without one.
    """

    work: Work | None = None  # whose update left it; None before the first update
    tensors: Mapping[str, Array] = MappingProxyType({})  # delta + previous residual - sent

    def before(self, work: Work) -> Mapping[str, Array]:
        """Return the residual tensors to add to the update of ``work``.

        Empty if the residual belongs to another run, or to this or a later piece of work. The
        latter happens when work is repeated, for example because the coordinator went back to an
        earlier checkpoint: the residual already went into the update that was sent.
        """
        if self.work is None or self.work.run != work.run:
            return {}
        if (self.work.round, self.work.sequence) >= (work.round, work.sequence):
            return {}
        return self.tensors
