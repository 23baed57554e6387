"""Central differential privacy for whole workers: DP-FedAvg.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1,
with a fixed denominator and every worker in every round. An update is clipped to a norm, all count
the same, and Gaussian noise is added to the sum: what a model tells of any one worker is bounded by
(epsilon, delta), whoever sees all of the models.

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

from fluffle_common.tensors.weights import Array, Weights, finite_norm
from fluffle_coordinator.strategy.arguments import within
from fluffle_coordinator.strategy.base import Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.linear import Folded, Linear

_NORM_ERROR = 1e-5  # more than ``finite_norm`` is wrong by, in parts of the norm
_MANTISSA = 53
_MOST_ROUNDS = 10**9


@dataclass(frozen=True)
class Private:
    """The mean that ``private`` makes.

    Args:
        total: adds up what was clipped, and divides it.
        spread: the standard deviation of the noise on each coordinate of the mean.
        noise: the same of the sum, in parts of the clipping norm.
        delta: of the (epsilon, delta) that is told.
        needs: that no more rounds are made than the budget allows.
    """

    total: Linear
    spread: float
    noise: float
    delta: float
    needs: Needs

    def init(self, weights: Weights) -> Folded:
        """Return an empty sum."""
        return self.total.init(weights)

    def fold(self, state: Folded, one: Contribution) -> Folded:
        """Clip an update and add it to the sum."""
        return self.total.fold(state, one)

    def finish(self, state: Folded, weights: Weights) -> tuple[Weights, Folded]:
        """Return the mean delta with its noise, in float64, and an empty sum."""
        delta, emptied = self.total.finish(state, weights)
        for (block,) in in_blocks(delta):
            np.add(block, self.spread * gaussian(block.size), out=block)
        return delta, emptied

    def spent(self, rounds: int) -> Mapping[str, float]:
        """Return the privacy that so many rounds cost."""
        return {"epsilon": epsilon(self.noise, rounds, self.delta), "delta": self.delta}


def private(
    clip: float,
    noise: float,
    workers: int,
    delta: float = 1e-5,
    budget: float | None = None,
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

    Raises:
        ValueError: for an argument that is out of range, or a budget that allows no round.
    """
    within("clip", clip, 0, above=True)
    within("noise", noise, 0, above=True)
    within("workers", workers, 1)
    within("delta", delta, 0, 1, above=True, below=True)
    needs = Needs(repeatable=False, once=True)
    if budget is not None:
        within("budget", budget, 0, above=True)
        needs = dataclasses.replace(needs, max_rounds=_rounds_within(budget, noise, delta))

    def factor(one: Contribution) -> tuple[float, float, float]:
        norm = finite_norm(one.delta) * (1 + _NORM_ERROR)
        return min(1.0, clip / norm) if norm else 1.0, 0.0, 0.0

    total = Linear(factor, lambda *_: 1 / workers, Needs())
    return Private(total, noise * clip / workers, noise, delta, needs)


def epsilon(noise: float, rounds: int, delta: float) -> float:
    """Return the epsilon of so many Gaussian mechanisms together, exactly.

    They are one mechanism with mu = sqrt(rounds) / noise (Dong, Roth and Su, "Gaussian Differential
    Privacy", JRSS B 2022, corollaries 1 and 2; Balle and Wang, ICML 2018, theorem 8). Neighbouring
    data sets differ by one worker, who is there or is not.

    Args:
        noise: the standard deviation of the noise, in parts of the sensitivity.
        rounds: how many.
        delta: of (epsilon, delta).

    Example:
        >>> round(epsilon(1.0, 1, 1e-5), 3), epsilon(1.0, 0, 1e-5)
        (4.377, 0.0)
    """
    mu = math.sqrt(rounds) / noise
    if not rounds or _delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        low, high = high, 2 * high
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def gaussian(size: int) -> Array:
    """Return so many standard normal values in float64, from the system's cryptographic source.

    Box and Muller's transform of 53-bit uniforms: the tails end at 8.5 standard deviations.
    """
    pairs = -(-size // 2)
    bits = np.frombuffer(secrets.token_bytes(16 * pairs), np.uint64) >> np.uint64(64 - _MANTISSA)
    uniform = (bits.astype(np.float64).reshape(2, pairs) + 1) * 2.0**-_MANTISSA  # never 0
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def _delta(epsilon: float, mu: float) -> float:
    """Return the smallest delta for an epsilon, of a Gaussian mechanism."""
    below = _log_normal(-epsilon / mu - mu / 2)
    return math.exp(_log_normal(-epsilon / mu + mu / 2)) - math.exp(epsilon + below)


def _log_normal(x: float) -> float:
    """Return the logarithm of the share of a standard normal that is below ``x``."""
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    # What follows of the asymptotic series is less than 3 / x**4, a few millionths.
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / (x * x))


def _rounds_within(budget: float, noise: float, delta: float) -> int:
    """Return the most rounds that cost no more than a budget."""
    low, high = 0, 1
    while high < _MOST_ROUNDS and epsilon(noise, high, delta) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon(noise, middle, delta) <= budget else (low, middle)
    if not low:
        first = epsilon(noise, 1, delta)
        raise ValueError(
            f"budget={budget:g} allows no round: one costs an epsilon of {first:.3g} with "
            f"noise={noise:g}; increase the noise or the budget"
        )
    return low
