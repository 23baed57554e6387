"""The jobs that simulation engines run, on random data of the given shapes.

``lr``      1,000 clients with 60 MNIST-shaped examples each, of which 10 take part in a round;
            logistic regression, batches of 10, one epoch, 100 rounds, a test every 20 rounds
``emnist``  340 clients per round with 100 EMNIST-shaped examples each; a dense network 784-128-62,
            batches of 20, one epoch, 20 rounds, a test after the last one
``noop``    100 clients that do not train and send a model of 1.36 MB, 20 rounds

Other systems use this module too, so it imports nothing of fluffle but the worker's tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.noop import Noop

_SIDE = 28 * 28
_HELD_OUT = 10_000


@dataclass(frozen=True)
class Job:
    """One job.

    Args:
        tasks: returns one task that can be divided among the clients, or a task for each.
        clients: the number of clients.
        cohort: the number of clients that take part in a round.
        rounds: the default number of rounds.
        targets: upper limits of fluffle's results, by name.
        batch_size: the local batch size.
        test_every: the divided task tests the model of every so many rounds, and the last one.
    """

    tasks: Callable[[], Any]
    clients: int
    cohort: int
    rounds: int
    targets: Mapping[str, float]
    batch_size: int = 32
    test_every: int = 20

    @property
    def fraction(self) -> float:
        """The fraction of the clients that take part in a round."""
        return self.cohort / self.clients


def _classifier(width: int, classes: int, each: int, clients: int) -> Any:
    """Return a task that classifies random images; with ``width`` 0, without a hidden layer."""
    import optax
    from flax import nnx

    from fluffle import accuracy, flax_task

    class Dense(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.hidden = nnx.Linear(_SIDE, width, rngs=rngs) if width else None
            self.out = nnx.Linear(width or _SIDE, classes, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(x if self.hidden is None else nnx.relu(self.hidden(x)))

    rng = np.random.default_rng(0)

    def examples(count: int) -> tuple[Any, Any]:
        images = rng.random((count, _SIDE), np.float32)
        return images, rng.integers(0, classes, count, np.int32)

    return flax_task(
        Dense,
        optax.softmax_cross_entropy_with_integer_labels,
        optax.sgd,
        examples(each * clients),
        examples(_HELD_OUT),
        learning_rate=0.03,
        metrics={"accuracy": accuracy},
    )


JOBS = {
    "lr": Job(
        lambda: _classifier(0, 10, each=60, clients=1000),
        clients=1000,
        cohort=10,
        rounds=100,
        targets={"seconds": 10.0},
        batch_size=10,
    ),
    "emnist": Job(
        lambda: _classifier(128, 62, each=100, clients=340),
        clients=340,
        cohort=340,
        rounds=20,
        targets={"seconds_a_round": 1.0},
        batch_size=20,
    ),
    "noop": Job(
        lambda: [Noop(1_360_000, seed) for seed in range(100)],
        clients=100,
        cohort=100,
        rounds=20,
        targets={"seconds_a_round": 0.3},
    ),
}
