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
    """The operator's rules for a run. Times are in seconds.

    Args:
        rounds: the number of rounds.
        min_workers: how many workers must be present before the first round opens.
        least: the fewest updates that a round commits with, however many workers are lost;
            ``min_updates`` takes its place if ``close`` closes a round at its deadline.
        quorum: how many updates close a round.
        grace_s: how long to wait for further updates after the quorum.
        deadline_s: how long a round may stay open without a quorum.
        on_deadline: what happens then. ``reopen`` asks the workers present; ``close`` commits if
            there are ``min_updates``, and reopens otherwise; ``stop`` ends the run.
        min_updates: the fewest updates that ``close`` commits with.
        max_examples: the largest weight of an update; if None, only the number of examples that its
            worker announced bounds it.
        fraction: the fraction of the workers present that a round asks.
        sample: how many workers a round asks, in place of ``fraction``.
        over_provision: the factor by which more workers are asked than updates are waited for.
        selection: the rule that selects the workers.
        seed: the seed of the selection.
        secret: the seed of a Poisson sample, in place of ``selection`` and ``seed``: each worker is
            in a round with the chance ``fraction``, independently of all others. A round may then
            ask nobody, and a reopened round asks the same workers. None for no Poisson sample.
        patience: how many heartbeats a worker may miss before it counts as gone.
        max_reopenings: how often in a row a round is reopened without progress: no new update, and
            no worker whose steps advance.
        max_round_s: how long a round may stay open in total, whatever its workers' progress.
        stall_s: how long a training may stand still before it is reported.
        stall_timeout_s: how long it may stand still before it counts as failed; None sets no limit.
        outlier_ratio: an update is reported if its norm is more than this many times the median of
            its round or, in a round of one or two updates, the median of the last five rounds.
        max_norm_ratio: an update is rejected if its norm is more than this many times the median of
            the last five rounds; None rejects none. While no round is known, the updates counted
            before it take their place.
        wait_s: how long to wait for enough workers before the run stops.
        resend_s: how long a worker may be idle after its work was sent before it is sent again.
        hearing_s: how long the silence may last, the coordinator's own echo included, before the
            clock stops (see ``clock``); less if a shorter silence would already make workers
            count as gone. Infinity never stops the clock.
        rounds_limit: why there are no more rounds, if the operator asked for more.
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
    rounds_limit: str = ""

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
