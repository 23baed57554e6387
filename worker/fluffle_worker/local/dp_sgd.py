"""DP-SGD: clips the gradient of each example and adds noise that hides any single example."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from fluffle_common.errors import TaskError
from fluffle_worker.local.base import Named, Plain, check_number

_TINY = 1e-30


@dataclass(frozen=True)
class DpSgd(Plain):
    """Differentially private SGD; it protects single examples of this worker's data.

    Each example's gradient is scaled down to the norm ``clip``. Gaussian noise of standard
    deviation ``noise * clip / B`` is added to the mean over a batch of ``B`` examples. Source:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1. The rule needs
    JAX, and a task made with ``flax_task`` or ``torch_task``.

    The rule does not compute ε. Use an accountant with ``noise``, the batch size and the numbers of
    examples and steps, and note that batches are shuffled, not Poisson-sampled.

    The noise comes from JAX's counter-based generator with a fresh key from the operating system.
    It does not depend on the plan's seed, which the coordinator knows, so trainings are not
    reproducible.

    Args:
        clip: the largest norm of an example's gradient.
        noise: the noise multiplier; with 0, the rule only clips and protects nothing.

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
        """Return the key of the noise as the state.

        Raises:
            TaskError: if JAX is not installed.
        """
        try:
            import jax
            import jax.numpy as jnp
        except ModuleNotFoundError:
            raise TaskError(
                "the local rule 'dp_sgd' needs JAX for its noise, but JAX is not installed; run "
                "pip install 'fluffle[worker]'"
            ) from None

        words = [secrets.randbits(32), secrets.randbits(32)]
        return jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl="threefry2x32")

    def gradient(self, gradient: Named, weights: Named, state: Any) -> tuple[Named, Any]:
        """Return the private mean of gradients of shape [batch, …]."""
        import jax
        import jax.numpy as jnp

        exact = {name: array.astype(jnp.float32) for name, array in gradient.items()}
        squares = [(array**2).reshape(len(array), -1).sum(axis=1) for array in exact.values()]
        factors = jnp.minimum(1, self.clip / (jnp.sqrt(sum(squares)) + _TINY))
        next_key, *keys = jax.random.split(state, len(gradient) + 1)
        private = {}
        for key, (name, array) in zip(keys, exact.items(), strict=True):
            # By default, TPUs and GPUs may round the factors to fewer bits, and exceed the norm.
            total = jnp.tensordot(factors, array, axes=1, precision="highest")
            # One float32 normal value has 23 random bits: its tails end at 5.4 standard deviations,
            # and sums reveal which noise is possible. The sum of four has 92 (Holohan and Braghin,
            # "Secure Random Sampling in Differential Privacy", ESORICS 2021).
            normal = jax.random.normal(key, (4, *total.shape)).sum(axis=0) / 2
            noise = self.noise * self.clip * normal
            dtype = jax.dtypes.canonicalize_dtype(gradient[name].dtype)  # float64 by x64 only
            private[name] = ((total + noise) / len(factors)).astype(dtype)
        return private, next_key
