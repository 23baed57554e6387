"""DP-SGD: the gradient of each example is clipped, and noise covers what any one of them adds."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from fluffle_worker.local.base import Named, check_number

_TINY = 1e-30


@dataclass(frozen=True)
class DpSgd:
    """Differentially private SGD, at the level of one example of this worker's data.

    Each example's gradient is scaled down to the norm ``clip``; to the mean of a batch of ``B``,
    Gaussian noise of standard deviation ``noise * clip / B`` is added. From Abadi et al., "Deep
    Learning with Differential Privacy", CCS 2016. It needs JAX, and a task of ``flax_task``.

    What it does not do: it computes no ε. An accountant does, from ``noise``, the batch size, the
    number of examples and of steps; it must be told that batches are shuffled, not Poisson-sampled.
    Noise is drawn by JAX's counter-based generator from a fresh key of the system's random source,
    never from the plan's seed, which the coordinator knows: no two trainings are the same.

    Args:
        clip: the largest norm of an example's gradient.
        noise: the noise multiplier; 0 clips only, and protects nothing.

    Raises:
        UsageError: if ``clip`` is not above 0, ``noise`` is negative, or either is not finite.
    """

    clip: float
    noise: float

    per_example = True

    def __post_init__(self) -> None:
        """Check the settings."""
        check_number("dp_sgd", "clip", self.clip)
        check_number("dp_sgd", "noise", self.noise, zero=True)

    def begin(self, received: Named, broadcast: Named, kept: Named) -> Any:
        """See ``LocalRule``; the state is the key of the noise."""
        import jax
        import jax.numpy as jnp

        words = [secrets.randbits(32), secrets.randbits(32)]
        return jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl="threefry2x32")

    def gradient(self, gradient: Named, weights: Named, state: Any) -> tuple[Named, Any]:
        """See ``LocalRule``; the gradients that come have a first axis of examples."""
        import jax
        import jax.numpy as jnp

        squares = [(one * one).reshape(len(one), -1).sum(axis=1) for one in gradient.values()]
        lengths = jnp.sqrt(sum(one.astype(jnp.float32) for one in squares))
        factors = jnp.minimum(1, self.clip / (lengths + _TINY))
        size = len(factors)
        key, *keys = jax.random.split(state, len(gradient) + 1)
        private = {}
        for one_key, (name, one) in zip(keys, gradient.items(), strict=True):
            total = jnp.tensordot(factors, one.astype(jnp.float32), axes=1)
            noise = self.noise * self.clip * jax.random.normal(one_key, total.shape)
            private[name] = ((total + noise) / size).astype(one.dtype)
        return private, key

    def end(self, trained: Named, state: Any) -> Named:
        """See ``LocalRule``."""
        return {}
