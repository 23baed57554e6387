"""Central differential privacy for whole workers: DP-FedAvg.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1,
with a fixed denominator. Each update is clipped to a norm, all have the same weight, and Gaussian
noise is added to their sum. This bounds by (epsilon, delta) what all models of the run together
reveal about any one worker.

The noise comes from the system's cryptographic random source and is never stored, so
``fluffle replay`` cannot compute such a round again.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.weights import Array, Weights, finite_norm
from fluffle_coordinator.strategy import accountant as accounting
from fluffle_coordinator.strategy.accountant import Accountant
from fluffle_coordinator.strategy.base import NO_TENSORS, Contribution, Needs
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.linear_means import Linear, LinearSum
from fluffle_coordinator.strategy.pipeline import Mean

_NORM_ERROR = 1e-5  # an upper bound on the relative error of ``finite_norm``
_MANTISSA = 53
_CLIP_RATE = 0.2  # eta_C in the paper, which recommends this value for all tasks
_SMALLEST, _LARGEST = 1e-100, 1e100


@dataclass(frozen=True)
class _Quantile:
    """A clipping norm that follows a quantile of the updates' norms.

    Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm
    1. Updates within the norm count as 1/2 each, others as -1/2, so that one worker changes the
    count by 1/2.
    """

    quantile: float  # the fraction of the updates that should be within the norm
    noise: float  # the standard deviation of the noise on the count (sigma_b)

    def next(self, norm: float, count: float, workers: float) -> float:
        """Return the norm of the next round, given this round's count, without noise."""
        fraction = 0.5 + (count + self.noise * float(gaussian(1)[0])) / workers
        step = -_CLIP_RATE * (fraction - self.quantile)
        adapted = norm * math.exp(min(step, 700.0))  # a noisy count must not overflow it
        return min(max(adapted, _SMALLEST), _LARGEST)

    def noise_for_updates(self, noise: float) -> float:
        """Return the noise that the sum needs, so that sum and count together have ``noise``.

        Theorem 1 of the paper: z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2).

        Raises:
            ValueError: if the count alone reveals more than ``noise`` allows.
        """
        if 2 * self.noise <= noise:
            raise ValueError(
                f"count_noise={self.noise:g} is too low: it reveals more than noise={noise:g} "
                f"allows; raise count_noise= above {noise / 2:g}, or remove it"
            )
        return float((noise**-2 - (2 * self.noise) ** -2) ** -0.5)


@dataclass(frozen=True)
class _State:
    total: LinearSum  # of the open round's clipped updates
    norm: float  # the clipping norm of the open round
    count: float = 0.0  # of updates within the norm, as ``_Quantile`` counts them


@dataclass(frozen=True)
class _DPFedAvg:
    clip: float
    noise: float  # on the sum
    workers: int
    accountant: Accountant
    needs: Needs
    quantile: _Quantile | None = None  # None if the clipping norm is fixed

    def init(self, weights: Weights) -> _State:
        return _State(self._sum().init(weights), self.clip)

    def fold(self, state: _State, one: Contribution) -> _State:
        norm = finite_norm(one.delta) * (1 + _NORM_ERROR)
        factor = min(1.0, state.norm / norm) if norm else 1.0
        count = state.count + (0.5 if norm <= state.norm else -0.5)
        return _State(self._sum(factor).fold(state.total, one), state.norm, count)

    def finish(self, state: _State, weights: Weights) -> tuple[Weights, _State]:
        emptied, norm = state.total, state.norm
        if state.total.empty:  # then the delta is only noise
            delta: Weights = {name: np.zeros(tensor.shape) for name, tensor in weights.items()}
        else:
            delta, emptied = self._sum().finish(state.total, weights)
        spread = self.noise * state.norm / self.workers
        for (block,) in in_blocks(delta):
            np.add(block, spread * gaussian(block.size), out=block)
        if self.quantile is not None:
            norm = self.quantile.next(state.norm, state.count, self.workers)
        return delta, _State(emptied, norm)

    def spent(self, rounds: int) -> Mapping[str, float]:
        return {"epsilon": self.accountant.epsilon(rounds), "delta": self.accountant.delta}

    def dump(self, state: _State) -> Weights:
        return NO_TENSORS if self.quantile is None else {"clip": np.array(state.norm)}

    def load(self, saved: Weights, weights: Weights) -> _State:
        state = self.init(weights)
        if self.quantile is None:
            return state
        return dataclasses.replace(state, norm=float(saved["clip"]))

    def _sum(self, factor: float = 1.0) -> Linear:
        return Linear(lambda _: (factor, 0.0, 0.0), lambda *_: 1 / self.workers)


def dp_fedavg(
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
) -> Mean[_State]:
    """Return the mean of DP-FedAvg: clip, add up, add noise, divide by a fixed number of workers.

    Args:
        clip: the clipping norm, above 0.
        noise: the standard deviation of the noise on the sum, as a multiple of ``clip``, above 0.
        workers: the number that the sum is divided by: the expected number of updates in a round.
            It must not depend on the data.
        delta: the probability with which epsilon may not hold, above 0 and below 1. Choose it well
            below 1 / (the number of workers in the population).
        budget: the epsilon that the run must not exceed, which bounds its number of rounds.
        rate: the probability with which each worker is in a round, for Poisson sampling, above 0
            and below 1; ``workers`` is then ``rate`` times the population. None for no sampling.
        accountant: ``exact``, ``pld`` or ``rdp``; see ``accountant.accountant``.
        quantile: the quantile of the updates' norms that the clipping norm follows, above 0 and
            below 1; ``clip`` is then the norm of the first round, and ``noise`` covers the sum and
            the count of the quantile together.
        count_noise: the standard deviation of the noise on that count. The default is a twentieth
            of ``workers``, as in the paper, or ``noise`` if that is larger.

    Raises:
        ValueError: if an argument is out of range, the budget allows no round, or a package is
            missing.
    """
    within("clip", clip, 0, above=True)
    within("noise", noise, 0, above=True)
    within("workers", workers, 1)
    within("delta", delta, 0, 1, above=True, below=True)
    if rate is not None:
        within("rate", rate, 0, 1, above=True, below=True)
    ledger = accounting.accountant(noise, delta, rate, accountant)
    max_rounds = None
    if budget is not None:
        within("budget", budget, 0, above=True)
        max_rounds = ledger.rounds_within(budget)
    needs = Needs(repeatable=False, once=True, rate=rate, max_rounds=max_rounds)
    if quantile is None:
        if count_noise is not None:
            raise ValueError(
                "count_noise= has no effect without quantile=; remove count_noise=, or add "
                "quantile="
            )
        return _DPFedAvg(clip, noise, workers, ledger, needs)
    within("quantile", quantile, 0, 1, above=True, below=True)
    if count_noise is None:
        count_noise = max(workers / 20, noise)
    within("count_noise", count_noise, 0, above=True)
    adaptive = _Quantile(quantile, count_noise)
    return _DPFedAvg(clip, adaptive.noise_for_updates(noise), workers, ledger, needs, adaptive)


def gaussian(size: int) -> Array:
    """Return standard normal values, in float64, from the system's cryptographic random source.

    The Box-Muller transform of 53-bit uniform values: the tails end at 8.5 standard deviations.
    """
    pairs = -(-size // 2)
    bits = np.frombuffer(secrets.token_bytes(16 * pairs), np.uint64) >> np.uint64(64 - _MANTISSA)
    uniform = (bits.astype(np.float64).reshape(2, pairs) + 1) * 2.0**-_MANTISSA  # never 0
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
