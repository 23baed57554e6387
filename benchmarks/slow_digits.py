"""A task on scikit-learn's digits for a federation with one slow worker; used by ``asynchrony``.

    fluffle worker --task benchmarks.slow_digits:task --data share=3,train_s=3
    fluffle coordinator --evaluate benchmarks/slow_digits.py:test --monitor test/accuracy

The last of the ``WORKERS`` is the slow one. It has 80 % of the eights and nines and nothing else,
so that a federation without it would recognise only eight digits well. The others share the
remaining images at random. The task is softmax regression with ``tasks.sklearn``. Training takes a
few milliseconds, after which the worker sleeps until ``train_s`` have passed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

from benchmarks.arrays import Array
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Weights
from fluffle_worker.task import Progress, TaskOptions, TrainResult
from fluffle_worker.tasks.sklearn import SklearnTask

WORKERS = 4
SLOW = WORKERS - 1
_TRAINING = 1500  # of the 1,797 images; the coordinator tests with the others
_SLOW_DIGITS, _SLOW_PART = (8, 9), 0.8


@cache
def _digits() -> tuple[Array, Array]:
    """Return all images, shape [1797, 64], from 0 to 1, and their labels, in random order."""
    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return inputs[order] / 16, labels[order]


def share(worker: int) -> tuple[Array, Array]:
    """Return the images and labels that a worker trains on."""
    inputs, labels = (all_of[:_TRAINING] for all_of in _digits())
    at_slow = np.isin(labels, _SLOW_DIGITS)
    at_slow &= np.random.default_rng(1).random(_TRAINING) < _SLOW_PART
    places = np.flatnonzero(at_slow if worker == SLOW else ~at_slow)
    if worker != SLOW:
        places = places[worker::SLOW]
    return inputs[places], labels[places]


class SlowDigits(SklearnTask):
    """Softmax regression on one worker's share, with a fixed training time.

    Args:
        worker: the number of the worker, from 0.
        train_s: the duration of a training in seconds.
    """

    def __init__(self, worker: int, train_s: float) -> None:
        estimator = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.01)
        super().__init__(estimator, share(worker), classes=range(10), sample_seed=worker)
        self._train_s = train_s

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """Train, then sleep until the training time has passed."""
        until = time.monotonic() + self._train_s
        result = super().train(weights, plan, progress)
        time.sleep(max(0.0, until - time.monotonic()))
        return result


def task(options: TaskOptions) -> SlowDigits:
    """Return the task that ``--data`` describes."""
    settings = dict(pair.split("=", 1) for pair in options.data.split(","))
    return SlowDigits(int(settings["share"]), float(settings["train_s"]))


def test(weights: Mapping[str, Array]) -> dict[str, float]:
    """Return a model's accuracy on all test images, and on the slow worker's digits."""
    inputs, labels = (all_of[_TRAINING:] for all_of in _digits())
    correct = np.argmax(inputs @ weights["coef_"].T + weights["intercept_"], axis=1) == labels
    of_slow = np.isin(labels, _SLOW_DIGITS)
    return {"accuracy": float(correct.mean()), "slow": float(correct[of_slow].mean())}
