"""A model of 20,000 numbers that each owner pulls half the way to its own target: no two agree."""

import numpy as np

from fluffle_worker.task import EvalResult, TrainResult

COUNT = 20_000


class Pull:
    """See above; the federated average goes to the mean of the targets."""

    num_examples = 1

    def __init__(self, seed: int) -> None:
        self.target = target(seed)

    def init(self, seed):
        """Return zeros."""
        return {"w": np.zeros(COUNT, np.float32)}

    def train(self, weights, plan, progress):
        """Go half the way."""
        progress(1, 1, None)
        return TrainResult({"w": (weights["w"] + self.target) / 2}, self.num_examples)

    def evaluate(self, weights):
        """Return the mean square of what is missing."""
        return EvalResult(float(np.mean((weights["w"] - self.target) ** 2)), 1)


def target(seed: int) -> np.ndarray:
    """Return where an owner pulls to."""
    return np.random.default_rng(seed).normal(size=COUNT).astype(np.float32)
