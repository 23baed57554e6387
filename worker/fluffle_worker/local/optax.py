"""Adapter that makes an optax gradient transformation from a local rule."""

from __future__ import annotations

from typing import Any

import optax
from flax import nnx

from fluffle_worker.local.base import Named
from fluffle_worker.local.bound import BoundRule


def gradient_transformation(rule: BoundRule) -> optax.GradientTransformation:
    """Return a transformation to chain before an optimizer; its state is the rule's."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changed, state = rule.gradient(named(gradient), named(params), state)
        flat = nnx.to_flat_state(gradient)
        leaves = [(path, leaf.replace(changed[tensor_name(path)])) for path, leaf in flat]
        return nnx.from_flat_state(leaves), state

    return optax.GradientTransformation(lambda params: rule.begin(named(params)), update)


def named(state: Any) -> Named:
    """Return the arrays of a Flax state by name."""
    return {tensor_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def tensor_name(path: tuple[Any, ...]) -> str:
    """Return a tensor's name on the wire: its path in the model, joined by ``/``."""
    return "/".join(map(str, path))
