"""The waiting regression on a frozen backbone of 20 MB, of which each worker makes another."""

import numpy as np

from examples.numpy_regression import Regression
from fluffle_worker.task import TrainResult
from tests.e2e.waiting_task import task as small

SIZE = 20 * 10**6 // 4


class OnABackbone:
    """A task whose workers share one backbone; its update says which one it trained on."""

    share_frozen = True

    def __init__(self, regression: Regression, seed: int) -> None:
        self.regression, self.num_examples = regression, regression.num_examples
        self.backbone = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)

    def frozen(self):
        """Return the backbone."""
        return {"backbone/kernel": self.backbone}

    def use_frozen(self, tensors):
        """Take the federation's."""
        self.backbone = tensors["backbone/kernel"]

    def init(self, seed):
        """Return the regression's weights."""
        return self.regression.init(seed)

    def train(self, weights, plan, progress) -> TrainResult:
        """Train the regression."""
        result = self.regression.train(weights, plan, progress)
        metrics = {**result.metrics, "backbone": float(self.backbone[0])}
        return TrainResult(result.weights, self.num_examples, metrics)

    def evaluate(self, weights):
        """Evaluate the regression."""
        return self.regression.evaluate(weights)


def task(options):
    """Make the task of one owner, as the example does."""
    return OnABackbone(small(options), int(options.data.partition(":")[2].partition("/")[0]))
