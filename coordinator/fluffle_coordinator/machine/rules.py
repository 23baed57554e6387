"""What the operator decides of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fluffle_coordinator.machine.selection import UNIFORM, Selection, sample_size


@dataclass(frozen=True)
class Quorum:
    """How many updates close a round: a number, or a fraction of those expected.

    Example:
        >>> Quorum(number=2).of(3), Quorum(fraction=0.5).of(3), Quorum().of(3)
        (2, 2, 3)
    """

    number: int | None = None
    fraction: float = 1.0

    def of(self, expected: int) -> int:
        """Return how many of ``expected`` workers must have answered; at least 1."""
        if self.number is not None:
            return self.number
        return sample_size(self.fraction, expected)


@dataclass(frozen=True)
class Rules:
    """What the operator decided. Times in seconds.

    Args:
        rounds: how many rounds the run has.
        min_workers: how many workers must be present before the first round opens.
        least: the fewest updates that a round commits with, whoever is lost, unless ``close`` says
            otherwise at its deadline.
        quorum: how many updates close a round.
        grace_s: how long to wait for the others after the quorum.
        deadline_s: how long a round may stay open without a quorum.
        on_deadline: what happens then. ``reopen``: ask whoever is there now; ``close``: commit with
            what came if that is ``min_updates``, else reopen; ``stop``: end the run.
        min_updates: the fewest updates that ``close`` commits with.
        max_examples: the largest weight that an update may have; None bounds it only by the number
            of examples that its worker announced.
        fraction: which part of the workers present is asked in a round.
        sample: how many are asked, in place of a fraction.
        over_provision: how many times as many are asked as that, and as are waited for.
        selection: who is asked.
        seed: decides who is asked.
        secret: what lots are drawn from in place of the seed. Then each worker's own lot decides,
            with the chance ``fraction``, and nothing else: a round may ask nobody, and asks the
            same workers when it is reopened. None: by ``selection``.
        patience: how many heartbeats may fail to come before a worker counts as gone.
        max_reopenings: how often in a row a round is reopened with nothing new: no update, and no
            worker whose steps advance.
        max_round_s: how long a round may be open in all, however far its workers have come.
        stall_s: how long a training may stand still before people are told.
        stall_timeout_s: how long a training may stand still before it counts as failed; None waits.
        outlier_ratio: an update is far out if its norm is so many times the median of its round's.
        max_norm_ratio: refuse an update whose norm is more than so many times the median of the
            updates counted before it; None refuses none.
        wait_s: how long to wait for enough workers before the run stops.
        resend_s: how long a worker may be idle after work was sent to it before it is sent again.
        hearing_s: how long nobody may be heard, not even the coordinator's own echo, before time
            stops to count (see ``hearing``); less where workers speak so often that they would be
            gone by then. Infinity lets all time count.
    """

    rounds: int
    min_workers: int = 2
    least: int = 1
    quorum: Quorum = Quorum()
    grace_s: float = 0.0
    deadline_s: float = 600.0
    on_deadline: Literal["reopen", "close", "stop"] = "reopen"
    min_updates: int = 1
    max_examples: int | None = None
    fraction: float = 1.0
    sample: int | None = None
    over_provision: float = 1.0
    selection: Selection = UNIFORM
    seed: int = 0
    secret: int | None = field(default=None, repr=False)
    patience: int = 5
    max_reopenings: int = 3
    max_round_s: float = 86400.0
    stall_s: float = 120.0
    stall_timeout_s: float | None = None
    outlier_ratio: float = 10.0
    max_norm_ratio: float | None = None
    wait_s: float = 86400.0
    resend_s: float = 15.0
    hearing_s: float = 3.0

    def enough(self, present: int) -> bool:
        """Whether so many workers make a round that can close: the sample of them is no smaller."""
        least = max(self.least, self.quorum.number or 1)
        return not self.samples or min(present, self.sample_of(present)) >= least

    @property
    def samples(self) -> bool:
        """Whether only some of the workers present are asked."""
        return self.fraction < 1 or self.sample is not None or not self.selection.fixed

    def sample_of(self, present: int) -> int:
        """Return how many of the workers present a round is to have."""
        return self.sample or sample_size(self.fraction, present)

    def ask(self, present: int) -> int:
        """Return how many of the workers present are asked for that."""
        return math.ceil(self.over_provision * self.sample_of(present) - 1e-9)

    def waited_for(self, asked: int) -> int:
        """Return of how many, of those asked, the quorum is taken."""
        return max(1, math.floor(asked / self.over_provision + 1e-9))
