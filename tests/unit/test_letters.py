"""The letters' network."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluffle_worker.letters.task import halved


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
