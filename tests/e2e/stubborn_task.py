"""A task that is in C code when it is to end, or forks: ``--data MODE:NAME``."""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import time

import numpy as np

from fluffle_worker.task import EvalResult, TaskOptions, TrainResult


class Stubborn:
    """Adds one, after what its mode says."""

    num_examples = 5

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def init(self, seed):
        """Begin with nothing."""
        return {"w": np.zeros(4, np.float32)}

    def train(self, weights, plan, progress):
        """Do what the mode says, then add one."""
        progress(1, 2, None)
        if self._mode == "blas":
            square = np.ones((3000, 3000))
            while True:
                square @ square
        elif self._mode == "hash":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        elif self._mode == "sleep":
            time.sleep(1000)
        elif self._mode == "gil":
            time.sleep(0.5)  # what is to be said before is said
            re.match(r"(a+)+$", "a" * 40 + "b")
        elif self._mode == "fork":
            with multiprocessing.get_context("fork").Pool(2) as pool:
                pool.map(abs, range(4))
        elif self._mode == "fails":
            raise ValueError("it does")
        return TrainResult({"w": weights["w"] + 1}, 5)

    def evaluate(self, weights):
        """Find them all alike."""
        return EvalResult(1.0, 1)


def task(options: TaskOptions) -> Stubborn:
    """Make the task."""
    return Stubborn(options.data.partition(":")[0])
