"""Examples on a JAX device, and random keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fluffle_common.errors import TaskError
from fluffle_worker.tasks.checks import check_pair, checked_array
from fluffle_worker.tasks.examples import Examples


def key_of(seed: int) -> Any:
    """Return a random key that depends on all bits of a seed; JAX ignores those above 32."""
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def on_device(data: Examples, what: str, classes: Sequence[Any] = ()) -> Any:
    """Return (inputs, targets) on the device.

    Raises:
        TaskError: if they are not a pair of arrays of numbers, or a target is the index of no
            class, for which JAX would compute a loss of NaN, or that of another class if the index
            is negative; ``what`` names the data.
    """
    check_pair(data, what)
    inputs, targets = jax.tree.map(lambda part: checked_array(part, what), tuple(data))
    count = len(classes) if hasattr(classes, "__len__") else 0
    if count and getattr(targets, "ndim", 0) == 1 and jnp.issubdtype(targets.dtype, jnp.integer):
        least, most = int(targets.min(initial=0)), int(targets.max(initial=0))
        if least < 0 or most >= count:
            found = least if least < 0 else most
            raise TaskError(
                f"{what} contains the target {found}, but classes= has {count} names, for the "
                f"targets 0 to {count - 1}; list all classes"
            )
    return jax.device_put((inputs, targets))


def picked(source: Any, batch: Any) -> Any:
    """Return the batch's examples: ``batch`` itself, or the rows of ``source`` that it indexes."""
    if source is None:
        return batch
    return jax.tree.map(lambda part: jnp.take(part, batch, axis=0), source)
