"""Scikit-learn's digits for a federation with one slow worker; for ``asynchrony``.

    fluffle worker --task benchmarks.slow_digits:task --data share=3,train_s=3
    fluffle coordinator --evaluate benchmarks/slow_digits.py:test --monitor test/accuracy

The last of ``WORKERS`` is the slow one. It has most of the eights and nines there are, and nothing
else, so that a federation that did without it would be good at eight digits only. All others share
what is left at random. The task is fluffle's own for scikit-learn (``tasks.sklearn``), softmax
regression; what it learns takes a few milliseconds, and then it waits until ``train_s`` are over.
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
    """Return all images, shape [1797, 64], from 0 to 1, and their digits, in an order by chance."""
    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return inputs[order] / 16, labels[order]


def share(worker: int) -> tuple[Array, Array]:
    """Return the images and digits that a worker trains on."""
    inputs, labels = (all_of[:_TRAINING] for all_of in _digits())
    at_slow = np.isin(labels, _SLOW_DIGITS)
    at_slow &= np.random.default_rng(1).random(_TRAINING) < _SLOW_PART
    places = np.flatnonzero(at_slow if worker == SLOW else ~at_slow)
    if worker != SLOW:
        places = places[worker::SLOW]
    return inputs[places], labels[places]


class SlowDigits(SklearnTask):
    """Softmax regression on one share, which takes as long as it is told to.

    Args:
        worker: whose share, from 0.
        train_s: how long a training takes, in seconds.
    """

    def __init__(self, worker: int, train_s: float) -> None:
        estimator = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.01)
        super().__init__(estimator, share(worker), classes=range(10), sample_seed=worker)
        self._train_s = train_s

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """See ``task.Task``."""
        until = time.monotonic() + self._train_s
        found = super().train(weights, plan, progress)
        time.sleep(max(0.0, until - time.monotonic()))
        return found


def task(options: TaskOptions) -> SlowDigits:
    """Make the task that ``--data`` describes."""
    told = dict(pair.split("=", 1) for pair in options.data.split(","))
    return SlowDigits(int(told["share"]), float(told["train_s"]))


def test(weights: Mapping[str, Array]) -> dict[str, float]:
    """Return the share of the test images that a model gets right, of all and of the slow one's."""
    inputs, labels = (all_of[_TRAINING:] for all_of in _digits())
    right = np.argmax(inputs @ weights["coef_"].T + weights["intercept_"], axis=1) == labels
    of_slow = np.isin(labels, _SLOW_DIGITS)
    return {"accuracy": float(right.mean()), "slow": float(right[of_slow].mean())}
