"""Central differential privacy for whole workers: DP-FedAvg.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1,
with a fixed denominator. An update is clipped to a norm, all count the same, and Gaussian noise is
added to the sum: what a model tells of any one worker is bounded by (epsilon, delta), whoever sees
all of the models.

The noise comes from the system's cryptographic source, is drawn anew whenever a round is averaged,
and is kept nowhere: so such a round cannot be computed again by ``fluffle replay``.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.weights import Array, Weights, finite_norm
from fluffle_coordinator.strategy import accountant as accounting
from fluffle_coordinator.strategy.accountant import Accountant
from fluffle_coordinator.strategy.base import NO_NEEDS, NO_TENSORS, Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.linear import Folded, Linear

_NORM_ERROR = 1e-5  # more than ``finite_norm`` is wrong by, in parts of the norm
_MANTISSA = 53
_CLIP_RATE = 0.2  # eta_C of the paper, which recommends it for every task
_SMALLEST, _LARGEST = 1e-100, 1e100


@dataclass(frozen=True)
class Quantile:
    """How the clipping norm follows a quantile of the norms of the updates.

    Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm
    1. The updates within the norm are counted as 1/2 each, the others as -1/2, so that one worker
    changes the count by 1/2.

    Args:
        quantile: which part of the updates is to be within the norm.
        noise: the standard deviation of the noise on the count (sigma_b).
    """

    quantile: float
    noise: float

    def next(self, norm: float, count: float, workers: float) -> float:
        """Return the norm of the next round, given the count of this one without its noise."""
        part = 0.5 + (count + self.noise * float(gaussian(1)[0])) / workers
        found = norm * math.exp(-_CLIP_RATE * (part - self.quantile))
        return min(max(found, _SMALLEST), _LARGEST)

    def left_for_updates(self, noise: float) -> float:
        """Return how much noise the sum needs, so that with the count it is that of ``noise``.

        Theorem 1 of the paper: z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2).

        Raises:
            ValueError: if the count alone tells more than all may.
        """
        if 2 * self.noise <= noise:
            raise ValueError(
                f"count_noise={self.noise:g} tells more than noise={noise:g} allows; give a "
                f"count_noise above {noise / 2:g}, or leave it out"
            )
        return float((noise**-2 - (2 * self.noise) ** -2) ** -0.5)


@dataclass(frozen=True)
class Clipped:
    """The state of ``Private``: the open round's, and the norm that it is clipped to.

    Args:
        total: the sum of the clipped updates.
        norm: the clipping norm.
        count: of the updates within the norm, as ``Quantile`` counts them.
    """

    total: Folded
    norm: float
    count: float = 0.0


@dataclass(frozen=True)
class Private:
    """The mean that ``private`` makes.

    Args:
        clip: the norm that updates are clipped to; if it adapts, in the first round.
        noise: the standard deviation of the noise on the sum, in parts of the clipping norm.
        workers: what the sum is divided by.
        accountant: counts what it costs.
        needs: what it asks of the coordinator, such as no more rounds than the budget allows.
        quantile: how the clipping norm adapts; None: it does not.
    """

    clip: float
    noise: float
    workers: int
    accountant: Accountant
    needs: Needs
    quantile: Quantile | None = None

    def init(self, weights: Weights) -> Clipped:
        """Return the state that a run begins with."""
        return Clipped(self._sum().init(weights), self.clip)

    def fold(self, state: Clipped, one: Contribution) -> Clipped:
        """Clip an update and add it to the sum."""
        norm = finite_norm(one.delta) * (1 + _NORM_ERROR)
        factor = min(1.0, state.norm / norm) if norm else 1.0
        counted = 0.5 if norm <= state.norm else -0.5
        return Clipped(self._sum(factor).fold(state.total, one), state.norm, state.count + counted)

    def finish(self, state: Clipped, weights: Weights) -> tuple[Weights, Clipped]:
        """Return the mean delta with its noise, in float64, and the state of an empty round.

        A round without updates is noise alone.
        """
        emptied, norm = state.total, state.norm
        if state.total.empty:
            delta: Weights = layout_for(weights).empty_as(np.dtype(np.float64))
            for (block,) in in_blocks(delta):
                block[...] = 0
        else:
            delta, emptied = self._sum().finish(state.total, weights)
        spread = self.noise * state.norm / self.workers
        for (block,) in in_blocks(delta):
            np.add(block, spread * gaussian(block.size), out=block)
        if self.quantile is not None:
            norm = self.quantile.next(state.norm, state.count, self.workers)
        return delta, Clipped(emptied, norm)

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return the privacy that so many rounds cost."""
        return {"epsilon": self.accountant.epsilon(rounds), "delta": self.accountant.delta}

    def dump(self, state: Clipped) -> Weights:
        """Return the clipping norm, if it adapts."""
        return NO_TENSORS if self.quantile is None else {"clip": np.array(state.norm)}

    def load(self, saved: Weights, weights: Weights) -> Clipped:
        """Return the state that the next round begins with."""
        begun = self.init(weights)
        if self.quantile is None:
            return begun
        return dataclasses.replace(begun, norm=float(saved["clip"]))

    def _sum(self, factor: float = 1.0) -> Linear:
        return Linear(lambda _: (factor, 0.0, 0.0), lambda *_: 1 / self.workers, NO_NEEDS)


def private(
    clip: float,
    noise: float,
    workers: int,
    delta: float = 1e-5,
    budget: float | None = None,
    *,
    rate: float | None = None,
    accountant: str | None = None,
    quantile: float | None = None,
    count_noise: float | None = None,
) -> Private:
    """Clip each update, add up, add noise, and divide by a fixed number of workers.

    Args:
        clip: the norm that no update counts with more of, above 0.
        noise: the standard deviation of the noise on the sum, in parts of ``clip``, above 0.
        workers: what the sum is divided by: how many updates a round is expected to have. It must
            not follow from the data.
        delta: the chance that epsilon does not hold, above 0 and below 1; well below one in as many
            workers as there could be.
        budget: the epsilon that must not be exceeded; the run has no more rounds than it allows.
        rate: the chance of each worker to be in a round, for Poisson sampling, above 0 and below 1;
            None counts no sampling. With it, ``workers`` is ``rate`` times the population.
        accountant: ``exact``, ``pld`` or ``rdp``; see ``accountant.accountant``.
        quantile: lets the norm follow this quantile of the updates' norms, above 0 and below 1;
            ``clip`` is then the norm of the first round. ``noise`` is of the sum and the count of
            the quantile together.
        count_noise: the standard deviation of the noise on that count; a twentieth of ``workers``
            by default, as in the paper, or as much as ``noise`` if that is more.

    Raises:
        ValueError: for an argument that is out of range, a budget that allows no round, or a
            package that is missing.
    """
    within("clip", clip, 0, above=True)
    within("noise", noise, 0, above=True)
    within("workers", workers, 1)
    within("delta", delta, 0, 1, above=True, below=True)
    if rate is not None:
        within("rate", rate, 0, 1, above=True, below=True)
    counts = accounting.accountant(noise, delta, rate, accountant)
    most = None
    if budget is not None:
        within("budget", budget, 0, above=True)
        most = counts.rounds_within(budget)
    needs = Needs(repeatable=False, once=True, rate=rate, max_rounds=most)
    if quantile is None:
        if count_noise is not None:
            raise ValueError("count_noise goes with quantile; leave it out, or give quantile=…")
        return Private(clip, noise, workers, counts, needs)
    within("quantile", quantile, 0, 1, above=True, below=True)
    if count_noise is None:
        count_noise = max(workers / 20, noise)
    within("count_noise", count_noise, 0, above=True)
    adapts = Quantile(quantile, count_noise)
    return Private(clip, adapts.left_for_updates(noise), workers, counts, needs, adapts)


def gaussian(size: int) -> Array:
    """Return so many standard normal values in float64, from the system's cryptographic source.

    Box and Muller's transform of 53-bit uniforms: the tails end at 8.5 standard deviations.
    """
    pairs = -(-size // 2)
    bits = np.frombuffer(secrets.token_bytes(16 * pairs), np.uint64) >> np.uint64(64 - _MANTISSA)
    uniform = (bits.astype(np.float64).reshape(2, pairs) + 1) * 2.0**-_MANTISSA  # never 0
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
