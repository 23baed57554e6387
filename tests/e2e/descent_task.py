"""Gradient descent on a quadratic, by whatever local rule: ``--data TARGET/STEPS``."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluffle_worker.local.bound import BoundRule
from fluffle_worker.task import EvalResult, TaskOptions, TrainResult


class Descent:
    """Each worker has an optimum, and a number of steps, of its own."""

    num_examples = 10

    def __init__(self, target: float, steps: int) -> None:
        self.target, self.steps, self.local_rule = np.float32(target), steps, BoundRule()

    def init(self, seed: int) -> Any:
        return {"w": np.zeros(40, np.float32)}

    def evaluate(self, weights: Any) -> EvalResult:
        return EvalResult(0.0, 1)

    def train(self, weights: Any, plan: Any, progress: Any) -> TrainResult:
        state = self.local_rule.begin(weights)
        for number in range(1, self.steps + 1):
            gradient = {"w": weights["w"] - self.target}
            gradient, state = self.local_rule.gradient(gradient, weights, state)
            weights = {"w": weights["w"] - np.float32(0.5) * gradient["w"]}
            progress(number, self.steps, None)
        self.local_rule.end(weights, state)
        return TrainResult(weights, self.num_examples)


def task(options: TaskOptions) -> Descent:
    target, _, steps = options.data.partition("/")
    return Descent(float(target), int(steps))
