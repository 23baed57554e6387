"""The letters task written for Flower in the style of Flax's tutorials.

It has the same network, images, random shifts, batch size and optimizer as fluffle's task, but uses
``nnx.max_pool``, ``nnx.jit`` and JAX's defaults, without a compilation cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.arrays import Array
from fluffle_worker.letters.images import held_out_split, read_images
from fluffle_worker.letters.task import CNN, LEARNING_RATE, shifted

_BATCH = 32


class PlainCNN(CNN):
    """The same layers, with Flax's max-pooling."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits, shape [batch, classes], of images, shape [batch, 100, 100, 1]."""
        hidden = nnx.max_pool(nnx.relu(self.conv1(images)), (2, 2), strides=(2, 2))
        hidden = nnx.relu(self.conv2(hidden))
        return self.dense(hidden.reshape(hidden.shape[0], -1))


def _loss(model: PlainCNN, images: Any, targets: Any) -> Any:
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), logits


@nnx.jit
def _train_step(model: PlainCNN, optimizer: Any, key: Any, images: Any, targets: Any) -> Any:
    gradient = nnx.grad(_loss, has_aux=True)
    grads, _ = gradient(model, shifted(key, images), targets)
    optimizer.update(model, grads)


@nnx.jit
def _eval_step(model: PlainCNN, images: Any, targets: Any) -> Any:
    loss, logits = _loss(model, images, targets)
    return loss, (logits.argmax(axis=1) == targets).mean()


class PlainLetters:
    """A ``model.Model`` on a client's letters.

    Args:
        data: the client's folder ``<class>/<image>``.
    """

    def __init__(self, data: str) -> None:
        images = read_images(Path(data))
        train, held_out = held_out_split(images, 0)
        self._train = jnp.asarray(images.inputs[train]), jnp.asarray(images.targets[train])
        self._valid = jnp.asarray(images.inputs[held_out]), jnp.asarray(images.targets[held_out])
        self._model = PlainCNN(len(images.classes), nnx.Rngs(0))
        self._rng = np.random.default_rng(0)
        self.num_examples = len(train)

    def first(self) -> list[Array]:
        """Return the first weights."""
        return self._arrays()

    def train(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """Train for one epoch from ``arrays``."""
        self._load(arrays)
        optimizer = nnx.Optimizer(self._model, optax.adam(LEARNING_RATE), wrt=nnx.Param)
        images, targets = self._train
        order = self._rng.permutation(self.num_examples)
        order = np.resize(order, -(-len(order) // _BATCH) * _BATCH)  # as many steps as in fluffle
        for step, batch in enumerate(np.split(order, len(order) // _BATCH)):
            key = jax.random.key(number * 1000 + step)
            _train_step(self._model, optimizer, key, images[batch], targets[batch])
        return self._arrays()

    def evaluate(self, arrays: Sequence[Array]) -> tuple[float, int, dict[str, float]]:
        """Evaluate ``arrays`` on the held-out letters."""
        self._load(arrays)
        loss, accuracy = _eval_step(self._model, *self._valid)
        return float(loss), len(self._valid[1]), {"accuracy": float(accuracy)}

    def _arrays(self) -> list[Array]:
        state = nnx.to_flat_state(nnx.state(self._model, nnx.Param))
        return [np.asarray(leaf.get_value()) for _, leaf in state]

    def _load(self, arrays: Sequence[Array]) -> None:
        state = nnx.to_flat_state(nnx.state(self._model, nnx.Param))
        loaded = [
            (path, leaf.replace(jnp.asarray(array)))
            for (path, leaf), array in zip(state, arrays, strict=True)
        ]
        nnx.update(self._model, nnx.from_flat_state(loaded))
