"""The letters task: the article's small CNN, on folders of images."""

from __future__ import annotations

from pathlib import Path

import jax
import optax
from flax import nnx

from fluffle_common.console import warn
from fluffle_worker.letters.images import SIDE, read_images, split
from fluffle_worker.task import TaskOptions
from fluffle_worker.training import Examples, FlaxTask, accuracy, flax_task

HELD_OUT = 0.1
LEARNING_RATE = 1e-3
_FLAT = 46 * 46 * 16  # what two unpadded convolutions and a halving leave of 100 by 100


class CNN(nnx.Module):
    """Conv 8 (5x5), relu, max-pool 2, conv 16 (3x3), relu, dense: 339,946 parameters for A to J."""

    def __init__(self, num_classes: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 8, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(_FLAT, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits, shape [batch, classes], of images, shape [batch, 100, 100, 1]."""
        hidden = nnx.relu(self.conv1(images))
        hidden = nnx.max_pool(hidden, (2, 2), strides=(2, 2))
        hidden = nnx.relu(self.conv2(hidden))
        return self.dense(hidden.reshape(hidden.shape[0], _FLAT))


def letters_task(
    classes: tuple[str, ...],
    train: Examples,
    valid: Examples | None,
    sample_seed: int = 0,
) -> FlaxTask:
    """Make the task from arrays: inputs [n, 100, 100, 1] float32, targets [n] int32."""
    assert train[0].shape[1:] == (SIDE, SIDE, 1)
    return flax_task(
        lambda rngs: CNN(len(classes), rngs),
        optax.softmax_cross_entropy_with_integer_labels,
        optax.adam,
        train,
        valid,
        learning_rate=LEARNING_RATE,
        metrics={"accuracy": accuracy},
        classes=classes,
        sample_seed=sample_seed,
    )


def task(options: TaskOptions) -> FlaxTask:
    """Make the task of a folder ``<class>/<image>``; 10 % of it are held out, by ``--seed``.

    Raises:
        TaskError: where the folder has nothing to learn from.
    """
    images = read_images(Path(options.data), options.classes)
    for reason in images.skipped:
        warn(f"skipped: {reason}")
    train, held_out = split(len(images.targets), HELD_OUT, options.seed)
    valid = (images.inputs[held_out], images.targets[held_out]) if len(held_out) else None
    own = int.from_bytes(options.worker.encode()[-6:], "big")
    return letters_task(
        images.classes, (images.inputs[train], images.targets[train]), valid, own + options.seed
    )
