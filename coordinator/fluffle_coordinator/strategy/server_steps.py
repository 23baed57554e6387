"""Server steps: the mean delta of a round as the pseudo-gradient of an ordinary optimizer.

Momentum is FedAvgM (Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification", 2019); Adagrad, Adam and Yogi are algorithm 2 of Reddi et al.,
"Adaptive Federated Optimization", ICLR 2021. With the mean delta d of a round, in each coordinate:

::

    momentum    v = momentum v + d                             w = w + lr v
    adagrad     m = d                    v = v + d²            w = w + lr m / (sqrt(v) + tau)
    adam        m = b1 m + (1 - b1) d    v = b2 v + (1 - b2) d²
    yogi        m = b1 m + (1 - b1) d    v = v - (1 - b2) d² sign(v - d²)

All start with m = v = 0. The paper's initial v is at least tau²; zero is the usual choice, and only
``tau`` then bounds the first step. Steps are computed in float64. The state is float32, or float64
for float64 tensors, and is rounded once per round, so a run that is resumed from a checkpoint
continues bit for bit as if it had not stopped.

The mean delta is added to integer tensors unchanged, as in federated averaging, since a step of
``lr`` would round to zero.

Example:
    >>> base = {"w": np.zeros(1)}
    >>> step = momentum(lr=0.5, momentum=0.9)
    >>> weights, velocity = step.step(step.init(base), base, {"w": np.array([2.0])})
    >>> weights["w"], velocity["w"]
    (array([1.]), array([2.]))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fluffle_common.arguments import within
from fluffle_common.tensors.layout import Tensors, layout_for
from fluffle_common.tensors.weights import Array, Weights, is_float, largest
from fluffle_coordinator.strategy.blocks import in_blocks
from fluffle_coordinator.strategy.pipeline import Server, with_prefix, without_prefix
from fluffle_coordinator.strategy.weighted import apply_delta

_FLOAT = np.dtype(np.float64)
_END_OF_RATES = 1e6  # the model of a larger rate would only saturate
_STEPS = "steps"
_FIRST, _SECOND = "first/", "second/"  # prefixes in a checkpoint


@dataclass(frozen=True)
class _Momentum(Server[Weights]):
    """The state is the velocity."""

    lr: float
    momentum: float

    def init(self, weights: Weights) -> Weights:
        return _zeros(weights)

    def step(self, state: Weights, weights: Weights, delta: Weights) -> tuple[Weights, Weights]:
        change, velocity = _change(weights, delta), _zeros(weights)
        with np.errstate(over="ignore", under="ignore"):
            for old, new, mean, step in in_blocks(state, velocity, delta, change):
                exact = self.momentum * old.astype(_FLOAT) + mean
                new[...] = _saturated(exact, new)
                step[...] = _saturated(self.lr * exact, step)
        return apply_delta(weights, change), velocity

    def dump(self, state: Weights) -> Weights:
        return state

    def load(self, saved: Weights, weights: Weights) -> Weights:
        return saved


def momentum(lr: float = 1.0, momentum: float = 0.9) -> Server[Weights]:
    """Return the server step of FedAvgM: heavy-ball momentum.

    Args:
        lr: the server's learning rate, above 0 and below a million.
        momentum: the decay of the velocity, from 0 and below 1. With ``momentum=0`` and ``lr=1``,
            this is federated averaging.

    Raises:
        ValueError: if an argument is out of range.
    """
    within("lr", lr, 0, _END_OF_RATES, above=True, below=True)
    within("momentum", momentum, 0, 1, below=True)
    return _Momentum(lr, momentum)


@dataclass(frozen=True)
class _Moments:
    first: Weights  # m
    second: Weights  # v
    steps: int = 0


@dataclass(frozen=True)
class _Adaptive(Server[_Moments]):
    lr: float
    beta1: float
    beta2: float  # here, only the bias correction uses it
    tau: float
    second: Callable[[Array, Array], Array]  # the next v, given v and d²
    bias_correction: bool = False

    def __post_init__(self) -> None:
        within("lr", self.lr, 0, _END_OF_RATES, above=True, below=True)
        within("beta1", self.beta1, 0, 1, below=True)
        within("beta2", self.beta2, 0, 1, below=True)
        within("tau", self.tau, 0, above=True)

    def init(self, weights: Weights) -> _Moments:
        return _Moments(_zeros(weights), _zeros(weights))

    def step(self, state: _Moments, weights: Weights, delta: Weights) -> tuple[Weights, _Moments]:
        steps = state.steps + 1
        change = _change(weights, delta)
        first, second = _zeros(weights), _zeros(weights)
        rate = self.lr
        if self.bias_correction:
            rate *= math.sqrt(1 - self.beta2**steps) / (1 - self.beta1**steps)
        blocks = in_blocks(state.first, state.second, delta, first, second, change)
        with np.errstate(over="ignore", under="ignore"):
            for old_m, old_v, mean, new_m, new_v, step in blocks:
                m = self.beta1 * old_m.astype(_FLOAT) + (1 - self.beta1) * mean
                squared = np.minimum(np.square(mean, dtype=_FLOAT), largest(_FLOAT))
                v = np.minimum(self.second(old_v.astype(_FLOAT), squared), largest(_FLOAT))
                new_m[...], new_v[...] = _saturated(m, new_m), _saturated(v, new_v)
                step[...] = _saturated(rate * m / (np.sqrt(v) + self.tau), step)
        return apply_delta(weights, change), _Moments(first, second, steps)

    def dump(self, state: _Moments) -> Weights:
        return {
            _STEPS: np.array(state.steps, np.int64),
            **with_prefix(_FIRST, state.first),
            **with_prefix(_SECOND, state.second),
        }

    def load(self, saved: Weights, weights: Weights) -> _Moments:
        first, second = without_prefix(_FIRST, saved), without_prefix(_SECOND, saved)
        return _Moments(first, second, int(saved[_STEPS]))


def adagrad(lr: float = 0.1, tau: float = 0.001) -> Server[_Moments]:
    """Return the server step of FedAdagrad, without momentum, as in the paper's experiments.

    The arguments are as in ``adam``.
    """
    return _Adaptive(lr, 0.0, 0.0, tau, lambda v, squared: v + squared)


def adam(
    lr: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 0.001,
    bias_correction: bool = False,
) -> Server[_Moments]:
    """Return the server step of FedAdam.

    Args:
        lr: the server's learning rate, above 0 and below a million: about how far a
            weight moves per round.
        beta1: the decay of the first moment, from 0 and below 1.
        beta2: the decay of the second moment, from 0 and below 1; larger values change it slower.
        tau: the constant that limits adaptivity, above 0; smaller values adapt more.
        bias_correction: whether to correct the bias of moments that start at 0, as in Kingma and
            Ba, "Adam", ICLR 2015. Algorithm 2 of Reddi et al. does not, so its first steps are
            small.

    Raises:
        ValueError: if an argument is out of range.
    """

    def second(v: Array, squared: Array) -> Array:
        return beta2 * v + (1 - beta2) * squared

    return _Adaptive(lr, beta1, beta2, tau, second, bias_correction)


def yogi(
    lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 0.001
) -> Server[_Moments]:
    """Return the server step of FedYogi: like ``adam``, but the second moment shrinks more slowly.

    The arguments are as in ``adam``.
    """

    def second(v: Array, squared: Array) -> Array:
        sign: Array = np.sign(v - squared)
        return v - (1 - beta2) * squared * sign

    return _Adaptive(lr, beta1, beta2, tau, second)


def _zeros(weights: Weights) -> dict[str, Array]:
    """Return zeros for each float tensor, in the dtype of the state."""
    return {
        name: np.zeros(tensor.shape, _FLOAT if tensor.dtype == _FLOAT else np.float32)
        for name, tensor in weights.items()
        if is_float(tensor.dtype)
    }


def _change(weights: Weights, delta: Weights) -> Tensors:
    """Return memory for the step, in which integer tensors already have their mean delta."""
    change = layout_for(weights).empty_as(_FLOAT)
    for name, tensor in weights.items():
        if not is_float(tensor.dtype):
            change[name][...] = delta[name]
    return change


def _saturated(values: Array, into: Array) -> Array:
    """Return values clipped to the range of the dtype of ``into``."""
    end = largest(into.dtype)
    return np.clip(values, -end, end)
