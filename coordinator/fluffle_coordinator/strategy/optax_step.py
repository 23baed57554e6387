"""Any optimizer of optax as a server step, if JAX is installed (``fluffle[worker]``).

The negated mean delta is the gradient. The step is computed in float32, on JAX's default device.
Integer tensors are not optimized: the mean delta is added to them.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluffle_common.arguments import write_arguments
from fluffle_common.installed import needs
from fluffle_common.tensors.codecs.base import clip_to
from fluffle_common.tensors.layout import layout_for
from fluffle_common.tensors.weights import Weights, is_float, largest
from fluffle_coordinator.strategy.pipeline import Server
from fluffle_coordinator.strategy.weighted import apply_delta


@dataclass(frozen=True)
class _OptaxStep(Server[Any]):
    """The state is that of ``transformation``, an ``optax.GradientTransformation``."""

    transformation: Any
    jax: Any  # the module, which a coordinator may not have

    def init(self, weights: Weights) -> Any:
        return self.transformation.init(_floats(weights))

    def step(self, state: Any, weights: Weights, delta: Weights) -> tuple[Weights, Any]:
        parameters = _floats(weights)
        # An array again, because NumPy negates an array of shape () to a number.
        gradient = {name: np.asarray(-_float32(delta[name])) for name in parameters}
        with np.errstate(over="ignore", under="ignore"):  # optax squares NumPy arrays
            update, state = self.transformation.update(gradient, state, parameters)
        change = layout_for(weights).empty_as(np.dtype(np.float64))
        for name, into in change.items():
            into[...] = update[name] if name in update else delta[name]
        return apply_delta(weights, change), state

    def dump(self, state: Any) -> Weights:
        leaves = self.jax.tree_util.tree_leaves(state)
        return {f"leaf-{number:05d}": self._saved(leaf) for number, leaf in enumerate(leaves)}

    def load(self, saved: Weights, weights: Weights) -> Any:
        like, structure = self.jax.tree_util.tree_flatten(self.init(weights))
        tensors = [saved[name] for name in sorted(saved)]
        leaves = [self._restored(tensor, leaf) for tensor, leaf in zip(tensors, like, strict=True)]
        return self.jax.tree_util.tree_unflatten(structure, leaves)

    def _is_key(self, leaf: Any) -> bool:
        numpy = self.jax.numpy
        return bool(numpy.issubdtype(numpy.result_type(leaf), self.jax.dtypes.prng_key))

    def _saved(self, leaf: Any) -> Any:
        """Return a leaf of a state as an array for a checkpoint; ``_restored`` undoes it."""
        array = np.asarray(self.jax.random.key_data(leaf) if self._is_key(leaf) else leaf)
        return array.astype(np.uint8) if array.dtype == np.bool_ else array

    def _restored(self, saved: Any, like: Any) -> Any:
        array = self.jax.numpy.asarray(saved)
        if self._is_key(like):
            return self.jax.random.wrap_key_data(array, impl=self.jax.random.key_impl(like))
        return array.astype(bool) if self.jax.numpy.result_type(like) == np.bool_ else array


def optax_step(optimizer: str, **arguments: Any) -> Server[Any]:
    """Return an optimizer of optax as a server step.

    Args:
        optimizer: its name in optax, such as ``adamw``.
        arguments: its arguments, such as ``learning_rate=0.1``.

    Raises:
        ValueError: if optax is not installed, or has no such optimizer, or it fails with these
            arguments.
    """
    with needs("server steps from optax need optax and JAX", "worker", ValueError):
        optax, jax = importlib.import_module("optax"), importlib.import_module("jax")
    make = getattr(optax, optimizer, None)
    if make is None:
        near = difflib.get_close_matches(optimizer.lower(), filter(str.islower, dir(optax)), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; give an optimizer, such as adamw"
        raise ValueError(f"unknown optax optimizer '{optimizer}'{hint}")
    try:
        made = make(**arguments)
        if isinstance(made, optax.GradientTransformation):
            # Trace a step, without computing it: only that shows an argument of a wrong type.
            form = {"w": np.zeros(2, np.float32)}
            jax.eval_shape(lambda w: made.update(w, made.init(w), w), form)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        given = write_arguments(arguments) or "no arguments"
        raise ValueError(f"optax.{optimizer} cannot be used with {given}: {reason}") from None
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"optax.{optimizer} is not an optimizer; give an optimizer, such as adamw")
    return _OptaxStep(made, jax)


def _floats(weights: Weights) -> dict[str, Any]:
    return {name: _float32(tensor) for name, tensor in weights.items() if is_float(tensor.dtype)}


def _float32(tensor: Any) -> Any:
    """Return a tensor in float32; float64 values saturate."""
    return np.asarray(clip_to(tensor, largest(np.dtype(np.float32))), np.float32)
