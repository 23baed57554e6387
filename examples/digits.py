"""A task of your own: an MLP on the handwritten digits that come with scikit-learn.

Run these in the project's folder, in five terminals, in any order (needs scikit-learn)::

    fluffle broker up
    fluffle coordinator --federation digits --quorum 3 --rounds 8 --epochs 3
    fluffle worker --federation digits --task examples/digits.py:task --data shard:0/3
    fluffle worker --federation digits --task examples/digits.py:task --data shard:1/3
    fluffle worker --federation digits --task examples/digits.py:task --data shard:2/3

Or divide all digits among a hundred simulated clients::

    fluffle simulate --task examples/digits.py:task --clients 100 --partition dirichlet:0.5
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from fluffle import Task, TaskOptions, accuracy, flax_task
from fluffle_worker.tasks.examples import Examples


class MLP(nnx.Module):
    """A multilayer perceptron with 64 pixels, 64 hidden units and 10 digits."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Return the logits, shape [batch, 10], of pixels, shape [batch, 64]."""
        return self.out(nnx.relu(self.hidden(pixels)))


def digits_task(train: Examples, valid: Examples | None, sample_seed: int) -> Task:
    """Make the task from pixels, [n, 64] float32 from 0 to 1, and targets, [n] int32."""
    return flax_task(
        MLP,
        optax.softmax_cross_entropy_with_integer_labels,
        optax.adam,
        train,
        valid,
        learning_rate=3e-3,
        metrics={"accuracy": accuracy},
        classes=tuple(map(str, range(10))),
        sample_seed=sample_seed,
    )


def task(options: TaskOptions) -> Task:
    """Make the task of one data owner.

    ``--data shard:I/N`` is part I of N, from 0; without ``--data``, it is all digits.
    """
    index, parts = map(int, (options.data or "shard:0/1").removeprefix("shard:").split("/"))
    if not 0 <= index < parts:
        raise ValueError(f"{parts} parts are shard:0/{parts} to shard:{parts - 1}/{parts}")
    digits = load_digits()
    pixels = (digits.data / 16).astype(np.float32)[index::parts]
    targets = digits.target.astype(np.int32)[index::parts]
    cut = len(pixels) // 10
    return digits_task((pixels[cut:], targets[cut:]), (pixels[:cut], targets[:cut]), index)
