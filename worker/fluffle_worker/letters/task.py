"""The letters task: a small CNN trained on folders of images."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fluffle_common.cli.console import warn
from fluffle_common.tensors.weights import Array, Weights
from fluffle_worker.letters.images import held_out_split, read_images
from fluffle_worker.letters.pixels import SIDE
from fluffle_worker.task import EvalResult, TaskOptions
from fluffle_worker.tasks.examples import Examples, accuracy
from fluffle_worker.tasks.flax import FlaxTask

LEARNING_RATE = 1e-3
_SHIFT = 4
_BATCH = 256
_FLAT = 46 * 46 * 16  # output of conv2 on 100 by 100 pixels: height, width, channels


class CNN(nnx.Module):
    """Conv 8 (5x5), relu, max-pool 2, conv 16 (3x3), relu, dense: 339,946 parameters for A to J."""

    def __init__(self, num_classes: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 8, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(_FLAT, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits, shape [batch, classes], of images, shape [batch, 100, 100, 1]."""
        hidden = nnx.relu(halved(self.conv1(images)))
        hidden = nnx.relu(self.conv2(hidden))
        return self.dense(hidden.reshape(hidden.shape[0], _FLAT))


def halved(images: jax.Array) -> jax.Array:
    """Max-pool by 2, like ``nnx.max_pool``, but about twice as fast in training on a CPU.

    On a CPU, the gradient of XLA's window reduction is a slow loop.

    Args:
        images: shape [batch, height, width, channels], both even.

    Returns:
        shape [batch, height / 2, width / 2, channels].
    """
    rows = jnp.maximum(images[:, 0::2], images[:, 1::2])
    return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


def shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shift each image by up to 4 pixels each way, because the model is not shift-invariant.

    They have the shape [batch, 100, 100, 1] and a black background.
    """
    padding = ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0))
    starts = jax.random.randint(key, (images.shape[0], 2), 0, 2 * _SHIFT + 1)

    def cut(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (SIDE, SIDE, 1))

    return jax.vmap(cut)(jnp.pad(images, padding), starts)


class LettersTask(FlaxTask):
    """The letters task, whose evaluation also fits a temperature that calibrates the model.

    A network's confidence often differs from its accuracy. Dividing its logits by one number, the
    temperature, corrects that without changing the predicted class (Guo et al., "On Calibration of
    Modern Neural Networks", ICML 2017, section 4.2). Each worker fits it on its own held-out
    letters; the federated mean is the metric ``temperature``.
    """

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """Evaluate ``weights`` on the held-out letters and fit the temperature."""
        result = super().evaluate(weights)
        if result is None or self._valid is None:
            return result
        inputs, targets = map(np.asarray, self._valid)
        temperature = fit_temperature(self.logits(weights, inputs), targets)
        return replace(result, metrics={**result.metrics, "temperature": temperature})

    def logits(self, weights: Weights, images: Array) -> Array:
        """Return the model's outputs for any number of images, shape [n, classes].

        They are computed in batches, because the first layer's outputs take 0.3 MB per image.
        """
        batches = range(0, len(images), _BATCH)
        return np.concatenate([self.outputs(weights, images[at : at + _BATCH]) for at in batches])


def fit_temperature(logits: Array, targets: Array) -> float:
    """Return the temperature, 0.5 to 8, at which the logits fit the targets best.

    ``logits`` has the shape [n, classes], and ``targets`` the shape [n].
    """
    grid = np.geomspace(0.5, 8.0, 33)
    scaled = logits.astype(np.float64) / grid[:, None, None]
    highest = scaled.max(axis=2, keepdims=True)
    log_sums = highest[..., 0] + np.log(np.exp(scaled - highest).sum(axis=2))
    losses = (log_sums - scaled[:, np.arange(len(targets)), targets]).sum(axis=1)
    # If the few held-out letters are all classified correctly, the best fit is unbounded
    # confidence; a penalty for distance from 1 prevents that.
    return float(grid[np.argmin(losses + 5 * np.log(grid) ** 2)])


def letters_task(
    classes: tuple[str, ...],
    train: Examples,
    valid: Examples | None,
    sample_seed: int = 0,
) -> LettersTask:
    """Return a task on arrays: inputs float32 [n, 100, 100, 1], targets int32 [n]."""
    assert train[0].shape[1:] == (SIDE, SIDE, 1)
    return LettersTask(
        lambda rngs: CNN(len(classes), rngs),
        optax.softmax_cross_entropy_with_integer_labels,
        optax.adam,
        train,
        valid,
        learning_rate=LEARNING_RATE,
        metrics={"accuracy": accuracy},
        augment=shifted,
        classes=classes,
        sample_seed=sample_seed,
    )


def task(options: TaskOptions) -> LettersTask:
    """Return the task on a folder ``<class>/<image>``; ``--seed`` decides which 10 % it holds out.

    Raises:
        TaskError: if the folder has no readable image.
    """
    images = read_images(Path(options.data), options.classes)
    for note in images.notes:
        warn(note)
    train, held_out = held_out_split(images, options.seed)
    valid = (images.inputs[held_out], images.targets[held_out]) if len(held_out) else None
    sample_seed = (zlib.crc32(options.worker.encode()) + options.seed) % 2**63
    return letters_task(
        images.classes, (images.inputs[train], images.targets[train]), valid, sample_seed
    )
