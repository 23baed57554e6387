"""The regression of the examples, and two tensors that nobody trains: 10 MB travel in parts."""

import numpy as np

from examples.numpy_regression import Regression
from examples.numpy_regression import task as small
from fluffle_worker.task import EvalResult, TrainResult


class Large:
    """See above."""

    def __init__(self, regression: Regression) -> None:
        self.regression = regression
        self.num_examples = regression.num_examples

    def init(self, seed):
        """Return slopes, an intercept, and what is only carried along."""
        ballast = {"ballast": np.ones(1_100_000), "counts": np.arange(300_000, dtype=np.int32)}
        return {**ballast, **self.regression.init(seed)}

    def train(self, weights, plan, progress) -> TrainResult:
        """Train the regression's part."""
        result = self.regression.train(weights, plan, progress)
        return TrainResult({**weights, **result.weights}, self.num_examples, result.metrics)

    def evaluate(self, weights) -> EvalResult:
        """Evaluate the regression's part."""
        return self.regression.evaluate(weights)


def task(options):
    """Make the task of one owner, as the example does."""
    return Large(small(options))
