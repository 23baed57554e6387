"""The operator's rules for a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fluffle_coordinator.machine.selection import UNIFORM, Selection, sample_size


@dataclass(frozen=True)
class Quorum:
    """How many updates close a round: a number, or a fraction of the updates expected.

    Example:
        >>> Quorum(number=2).of(3), Quorum(fraction=0.5).of(3), Quorum().of(3)
        (2, 2, 3)
    """

    number: int | None = None
    fraction: float = 1.0

    def of(self, expected: int) -> int:
        """Return how many of ``expected`` updates are needed; at least 1."""
        if self.number is not None:
            return self.number
        return sample_size(self.fraction, expected)


@dataclass(frozen=True)
class Rules:
    """The operator's rules for a run. Times are in seconds."""

    rounds: int
    min_workers: int = 2  # how many workers must be present before the first round opens
    # The fewest updates that a round commits with, however many workers are lost; ``min_updates``
    # takes its place if ``close`` closes a round at its deadline.
    least: int = 1
    quorum: Quorum = Quorum()
    grace_s: float = 0.0  # how long to wait for further updates after the quorum
    deadline_s: float = 600.0  # how long a round may stay open without a quorum
    # What happens then. ``reopen`` asks the workers present; ``close`` commits if there are
    # ``min_updates``, and reopens otherwise; ``stop`` ends the run.
    on_deadline: Literal["reopen", "close", "stop"] = "reopen"
    min_updates: int = 1
    # The largest weight of an update; if None, only what its worker announced bounds it.
    max_examples: int | None = None
    fraction: float = 1.0  # of the workers present that a round asks
    sample: int | None = None  # how many workers a round asks, in place of ``fraction``
    over_provision: float = 1.0  # by this factor, more workers are asked than updates waited for
    selection: Selection = UNIFORM
    seed: int = 0  # of the selection
    # The seed of a Poisson sample, in place of ``selection`` and ``seed``: each worker is in a
    # round with the chance ``fraction``, independently of all others. A round may then ask nobody,
    # and a reopened round asks the same workers. None for no Poisson sample.
    secret: int | None = field(default=None, repr=False)
    patience: int = 5  # how many heartbeats a worker may miss before it counts as gone
    # How often in a row a round is reopened without progress: no new update, and no worker whose
    # steps advance.
    max_reopenings: int = 3
    max_round_s: float = 86400.0  # how long a round may stay open, whatever its workers' progress
    stall_s: float = 120.0  # how long a training may stand still before it is reported
    stall_without_steps_s: float = 600.0  # the same for work that has not reported a step yet
    stall_timeout_s: float | None = None  # and before it counts as failed; None sets no limit
    # An update is rejected if its norm is more than this many times the median of the last five
    # rounds; None rejects none. While no round is known, the updates counted before it take their
    # place.
    max_norm_ratio: float | None = None
    wait_s: float = 86400.0  # how long to wait for enough workers before the run stops
    resend_s: float = 15.0  # how long a worker may be idle before its work is sent again
    # How long the silence may last, the coordinator's own echo included, before the clock stops
    # (see ``clock``); less if a shorter silence would already make workers count as gone. Infinity
    # never stops the clock.
    hearing_s: float = 3.0
    rounds_limit: str = ""  # why there are no more rounds, if the operator asked for more

    @property
    def fewest_updates(self) -> int:
        """The fewest updates that the quorum can be."""
        return max(self.least, self.quorum.number or 1)

    @property
    def fewest_present(self) -> int:
        """With how many workers present a round that asks a sample of them can reach its quorum."""
        if not self.samples:
            return 0
        least = self.fewest_updates
        if self.sample is not None:
            return least
        return max(least, math.floor((least - 1 + 1e-9) / self.fraction) + 1)  # see ``sample_size``

    @property
    def samples(self) -> bool:
        """Whether a round asks only some of the workers present."""
        return self.fraction < 1 or self.sample is not None or not self.selection.fixed

    def sample_of(self, present: int) -> int:
        """Return how many updates a round waits for, given how many workers are present."""
        return self.sample or sample_size(self.fraction, present)

    def ask(self, present: int) -> int:
        """Return how many of the workers present a round asks."""
        return math.ceil(self.over_provision * self.sample_of(present) - 1e-9)

    def waited_for(self, asked: int) -> int:
        """Return how many updates the quorum is a fraction of, given how many workers are asked."""
        wanted = math.floor(asked / self.over_provision + 1e-9)
        if self.selection.fixed:  # if fewer were present than ``ask`` says, all of them were asked
            wanted = max(wanted, min(asked, self.sample_of(asked)))
        return max(1, wanted)
