"""Privacy accounting: the epsilon of a number of rounds of clipped sums with Gaussian noise.

Neighbouring federations differ by the presence of one worker. Without sampling, epsilon is computed
here, exactly. With Poisson sampling, dp-accounting computes it (``fluffle[privacy]``).
"""

from __future__ import annotations

import bisect
import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fluffle_common.arguments import nearest, within

_MOST_ROUNDS = 10**9
_PLD_INTERVAL = 1e-4  # the default of dp-accounting's own accountant


@dataclass(frozen=True)
class Accountant:
    """The privacy cost of rounds; ``accountant`` makes one, and describes its fields."""

    noise: float
    delta: float
    rate: float
    method: str

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon of so many rounds."""
        return _METHODS[self.method](self, rounds) if rounds else 0.0

    def rounds_within(self, budget: float) -> int:
        """Return the largest number of rounds whose epsilon is within a budget.

        Raises:
            ValueError: if one round already exceeds it.
        """
        low, step = 0, 1  # by doubling steps, and then bisection
        while low + step < _MOST_ROUNDS and self.epsilon(low + step) <= budget:
            low += step
            step *= 2
        between = range(low + 1, low + step)
        most = low + bisect.bisect_left(between, True, key=lambda n: self.epsilon(n) > budget)
        if not most:
            raise ValueError(
                f"budget={budget:g} is too small for one round, which costs an epsilon of "
                f"{self.epsilon(1):.3g} with noise={self.noise:g}; raise noise= or budget="
            )
        return most


def accountant(
    noise: float, delta: float, rate: float | None = None, method: str | None = None
) -> Accountant:
    """Return an accountant.

    Args:
        noise: the standard deviation of the noise, as a multiple of the sensitivity.
        delta: the delta of (epsilon, delta).
        rate: the probability with which each worker is in a round; None if it is in every round.
        method: ``exact``, only without a rate; ``pld``, privacy loss distributions, which are
            tight; or ``rdp``, Rényi divergences, which are faster and give a larger epsilon. None
            for ``exact`` without a rate and ``pld`` with one.

    Raises:
        ValueError: if there is no such method, or its package is not installed.
    """
    method = method or ("exact" if rate is None else "pld")
    if method not in _METHODS:
        raise ValueError(f"unknown accountant '{method}'; {nearest(method, _METHODS)}")
    if method == "exact" and rate is not None:
        raise ValueError(
            "accountant=exact does not support sampling; remove rate=, or use accountant=pld or "
            "accountant=rdp"
        )
    if method != "exact":
        _library("pld")
    return Accountant(noise, delta, 1.0 if rate is None else rate, method)


def noise_within(
    budget: float,
    rounds: int,
    delta: float = 1e-5,
    rate: float | None = None,
    method: str | None = None,
) -> float:
    """Return the smallest ``noise`` of ``dp``, to three decimals, that allows so many rounds.

    Args:
        budget: the epsilon that the rounds together must not exceed.
        rounds: the number of rounds.
        delta: the delta of (epsilon, delta).
        rate: as in ``accountant``.
        method: as in ``accountant``.

    Raises:
        ValueError: if an argument is out of range, or no noise below 1,000 is enough.

    Example:
        >>> noise_within(budget=6, rounds=200, delta=1e-6)
        11.822
    """
    within("budget", budget, 0, above=True)
    within("rounds", rounds, 1)

    def enough(thousandths: int) -> bool:
        return accountant(thousandths / 1000, delta, rate, method).epsilon(rounds) <= budget

    most = 10**6
    found = bisect.bisect_left(range(1, most), True, key=enough) + 1
    if found == most:
        raise ValueError(
            f"no noise below {most // 1000:,} keeps epsilon within {budget:g} for {rounds} rounds; "
            "raise budget=, or run fewer rounds"
        )
    return found / 1000


def epsilon(noise: float, rounds: int, delta: float) -> float:
    """Return the exact epsilon of the composition of so many Gaussian mechanisms.

    It is one mechanism with mu = sqrt(rounds) / noise (Dong, Roth and Su, "Gaussian Differential
    Privacy", JRSS B 2022, corollaries 1 and 2; Balle and Wang, ICML 2018, theorem 8).

    Args:
        noise: the standard deviation of the noise, as a multiple of the sensitivity.
        rounds: the number of mechanisms.
        delta: the delta of (epsilon, delta).

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


def _delta(epsilon: float, mu: float) -> float:
    """Return the smallest delta of a Gaussian mechanism, given its epsilon."""
    below = _log_normal(-epsilon / mu - mu / 2)
    # At most 1; with hardly any noise, rounding errors would let it overflow.
    above = math.exp(min(0.0, epsilon + below))
    return math.exp(_log_normal(-epsilon / mu + mu / 2)) - above


def _log_normal(x: float) -> float:
    """Return the logarithm of the standard normal distribution function at ``x``."""
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    # The rest of the asymptotic series is less than 3 / x**4, a few millionths.
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / (x * x))


def _pld(of: Accountant, rounds: int) -> float:
    """Compose privacy loss distributions (Koskela et al., AISTATS 2020), rounded up.

    All rounds are composed at once, so that a resumed run gets the same value.
    """
    composed = _loss_distribution(of.noise, of.rate).self_compose(rounds)
    return float(composed.get_epsilon_for_delta(of.delta))


@functools.lru_cache(maxsize=8)
def _loss_distribution(noise: float, rate: float) -> Any:
    return _library("pld.privacy_loss_distribution").from_gaussian_mechanism(
        noise, value_discretization_interval=_PLD_INTERVAL, sampling_prob=rate
    )


def _rdp(of: Accountant, rounds: int) -> float:
    """Add up Rényi divergences (Mironov, CSF 2017)."""
    events, log = _library("dp_event"), importlib.import_module("absl.logging")
    before = log.get_verbosity()
    log.set_verbosity(log.ERROR)  # it warns of each order that it skips
    try:
        ledger = _library("rdp").RdpAccountant()
        event = events.PoissonSampledDpEvent(of.rate, events.GaussianDpEvent(of.noise))
        return float(ledger.compose(event, rounds).get_epsilon(of.delta))
    finally:
        log.set_verbosity(before)


def _library(part: str) -> ModuleType:
    try:
        return importlib.import_module(f"dp_accounting.{part}")
    except ModuleNotFoundError:
        raise ValueError(
            "rate= and accountant= need the package dp-accounting; run pip install "
            "'fluffle[privacy]', or remove rate= and accountant="
        ) from None


_METHODS: dict[str, Callable[[Accountant, int], float]] = {
    "exact": lambda of, rounds: epsilon(of.noise, rounds, of.delta),
    "pld": _pld,
    "rdp": _rdp,
}
