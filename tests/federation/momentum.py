"""A user's own strategy, in a file outside the product: server momentum."""

from __future__ import annotations

import numpy as np

from fluffle_coordinator.strategy.pipeline import Server, pipeline
from fluffle_coordinator.strategy.weighted import apply_delta, weighted


class Momentum(Server):
    """v = beta v + delta; w = w + rate v (FedAvgM, Hsu et al. 2019)."""

    def __init__(self, rate: float, beta: float) -> None:
        self.rate, self.beta = rate, beta

    def init(self, weights):
        return {name: np.zeros(tensor.shape) for name, tensor in weights.items()}

    def step(self, state, weights, delta):
        velocity = {name: self.beta * old + delta[name] for name, old in state.items()}
        moved = {name: self.rate * one for name, one in velocity.items()}
        return apply_delta(weights, moved), velocity

    def dump(self, state):
        return state

    def load(self, saved, weights):
        return {name: saved[name] for name in weights}


momentum = pipeline(mean=weighted(), server=Momentum(0.7, 0.9))
