"""The regression, whose training waits for a file, and which writes down what it trained.

``WAIT_FOR`` names a file that must exist before a training ends, ``WAIT_FROM`` the first training
of this process that waits for it (1 unless told); ``RECORD`` a folder for what was trained: one
``.npz`` a training, with the weights received and trained and the number of examples.
"""

import os
import time
import uuid
from pathlib import Path

import numpy as np

from examples.numpy_regression import Regression
from examples.numpy_regression import task as regression
from fluffle_worker.task import TaskOptions


class Waiting(Regression):
    """See above."""

    trainings = 0

    def train(self, weights, plan, progress):
        """Train, write down, wait."""
        result = super().train(weights, plan, progress)
        if record := os.environ.get("RECORD"):
            np.savez(
                Path(record) / f"{uuid.uuid4().hex}.npz",
                num_examples=result.num_examples,
                **{f"received {name}": tensor for name, tensor in weights.items()},
                **{f"trained {name}": tensor for name, tensor in result.weights.items()},
            )
        self.trainings += 1
        waits = self.trainings >= int(os.environ.get("WAIT_FROM", "1"))
        awaited = os.environ.get("WAIT_FOR")
        while waits and awaited and not Path(awaited).exists():
            time.sleep(0.02)
            progress(10, 10, None)
        return result


def task(options: TaskOptions) -> Waiting:
    """Make it of the data of the regression."""
    made = regression(options)
    made.__class__ = Waiting
    return made
