"""A user's own SCAFFOLD, in a file outside the product: a strategy and a local rule.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
algorithm 1, option II. The strategy broadcasts the control variate c; a worker keeps its own
variate c_k and returns its change.
"""

from __future__ import annotations

import numpy as np

from fluffle_coordinator.strategy.base import Needs, Strategy
from fluffle_coordinator.strategy.weighted import apply_delta

WORKERS, STEP = 2, 0.5


class Scaffold(Strategy):
    """x = x + mean(delta y), c = c + sum(delta c) / N."""

    needs = Needs(extra="model")

    def init(self, weights):
        return {name: np.zeros(w.shape, np.float64) for name, w in weights.items()}, []

    def broadcast(self, state):
        return {name: c.astype(np.float32) for name, c in state[0].items()}

    def fold(self, state, one):
        return state[0], [*state[1], one]

    def finish(self, state, weights):
        c, ones = state
        mean = {n: np.mean([one.delta[n].astype(np.float64) for one in ones], 0) for n in weights}
        c = {n: old + sum(one.extra[n].astype(np.float64) for one in ones) / WORKERS
             for n, old in c.items()}  # fmt: skip
        return apply_delta(weights, mean), (c, [])

    def dump(self, state):
        return state[0]

    def load(self, saved, weights):
        return dict(saved), []


class Controlled:
    """Replaces each gradient g by g + c - c_k."""

    def begin(self, received, broadcast, kept):
        c_k = {name: kept.get(name, np.zeros_like(w)) for name, w in received.items()}
        return received, {name: broadcast[name] for name in received}, c_k, 0

    def gradient(self, gradient, weights, state):
        received, c, c_k, steps = state
        changed = {name: gradient[name] + c[name] - c_k[name] for name in gradient}
        return changed, (received, c, c_k, steps + 1)

    def end(self, trained, state):
        received, c, c_k, steps = state
        new = {n: c_k[n] - c[n] + (received[n] - trained[n]) / (steps * STEP) for n in trained}
        return new, {name: new[name] - c_k[name] for name in new}


scaffold, controlled = Scaffold(), Controlled()
