"""The letters' network."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from fluffle_worker.letters.task import halved, letters_task, task
from fluffle_worker.task import TaskOptions


def test_halving_is_max_pooling_and_so_is_its_gradient():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8, 3)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 3)), jnp.float32)

    def pooled(images: jax.Array) -> jax.Array:
        return nnx.max_pool(images, (2, 2), strides=(2, 2))

    assert jnp.array_equal(halved(images), pooled(images))
    found, wanted = (
        jax.grad(lambda x, way=way: (way(x) * weights).sum())(images) for way in (halved, pooled)
    )
    assert jnp.array_equal(found, wanted)


def test_workers_with_the_same_ending_of_their_names_have_batches_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("L", (100, 100)).save(tmp_path / name / f"{number}.png")
    one, other = (
        task(TaskOptions(str(tmp_path), f"{city}-hospital")) for city in ("north", "south")
    )
    assert one._sample_seed != other._sample_seed


def test_any_number_of_held_out_letters_is_evaluated_in_batches(monkeypatch):
    images, targets = np.zeros((300, 100, 100, 1), np.float32), np.zeros(300, np.int32)
    task, sizes = letters_task(("a", "b"), (images, targets), (images, targets)), []
    monkeypatch.setattr(
        task, "outputs", lambda _, some: sizes.append(len(some)) or np.zeros((len(some), 2))
    )
    assert task.logits({}, images).shape == (300, 2)
    assert sizes == [256, 44]
