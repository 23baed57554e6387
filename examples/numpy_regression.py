"""A task without JAX: linear regression in plain NumPy, with the data divided among three owners.

Run these in the project's folder, in five terminals, in any order::

    fluffle broker up
    fluffle coordinator --federation regression --quorum 3 --rounds 10 --config learning_rate=0.3
    fluffle worker --federation regression --task examples/numpy_regression.py:task --data shard:0/3
    fluffle worker --federation regression --task examples/numpy_regression.py:task --data shard:1/3
    fluffle worker --federation regression --task examples/numpy_regression.py:task --data shard:2/3

The data are y = x @ SLOPES + INTERCEPT plus a little noise, so the federated loss falls to the
variance of the noise, and ``runs/regression/round-0010.safetensors`` contains values that are close
to SLOPES and INTERCEPT.
"""

from __future__ import annotations

import numpy as np

from fluffle import EvalResult, Plan, Progress, TaskOptions, TrainResult, Weights

SLOPES = np.array([2.0, -3.0, 0.5])
INTERCEPT = 4.0
EXAMPLES, NOISE, LEARNING_RATE = 300, 0.1, 0.1


class Regression:
    """Least squares by full-batch gradient descent on the local data."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        held_out = max(1, len(inputs) // 10)
        self._valid = inputs[:held_out], targets[:held_out]
        self._train = inputs[held_out:], targets[held_out:]
        self.num_examples = len(self._train[0])

    def init(self, seed: int) -> Weights:
        """Return small random slopes and an intercept of 0."""
        slopes = np.random.default_rng(seed).normal(0, 0.1, len(SLOPES))
        return {"slopes": slopes, "intercept": np.zeros(())}

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """Take ten steps per epoch."""
        inputs, targets = self._train
        rate = float(plan.learning_rate or plan.config.get("learning_rate", LEARNING_RATE))
        slopes, intercept = weights["slopes"].copy(), weights["intercept"].copy()
        steps = 10 * plan.epochs
        loss = 0.0
        for step in range(1, steps + 1):
            error = inputs @ slopes + intercept - targets
            loss = float(np.mean(error**2))
            slopes -= rate * inputs.T @ error / len(error)
            intercept -= rate * error.mean()
            progress(step, steps, loss)
        trained = {"slopes": slopes, "intercept": np.asarray(intercept)}
        return TrainResult(trained, self.num_examples, {"loss": loss})

    def evaluate(self, weights: Weights) -> EvalResult:
        """Return the mean squared error on the held-out data."""
        inputs, targets = self._valid
        error = inputs @ weights["slopes"] + weights["intercept"] - targets
        return EvalResult(float(np.mean(error**2)), len(error))


def task(options: TaskOptions) -> Regression:
    """Make the task of one data owner; ``--data shard:I/N`` is part I of N, from 0."""
    index, parts = map(int, options.data.removeprefix("shard:").split("/"))
    if not 0 <= index < parts:
        raise ValueError(f"{parts} parts are shard:0/{parts} to shard:{parts - 1}/{parts}")
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(EXAMPLES, len(SLOPES)))
    targets = inputs @ SLOPES + INTERCEPT + rng.normal(0, NOISE, EXAMPLES)
    return Regression(inputs[index::parts], targets[index::parts])
