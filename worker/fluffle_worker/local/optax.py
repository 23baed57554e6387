"""Adapter that makes an optax gradient transformation from a local rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import optax
from flax import nnx

from fluffle_worker.local.base import Named
from fluffle_worker.local.bound import BoundRule


def gradient_transformation(rule: BoundRule) -> optax.GradientTransformation:
    """Return a transformation to chain before an optimizer; its state is the rule's."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changed, state = rule.gradient(named(gradient), named(params), state)
        flat = flat_state(gradient)
        leaves = [(path, leaf.replace(changed[tensor_name(path)])) for path, leaf in flat]
        return nnx.from_flat_state(leaves), state

    return optax.GradientTransformation(lambda params: rule.begin(named(params)), update)


def named(state: Any) -> Named:
    """Return the arrays of a Flax state by name."""
    return {tensor_name(path): leaf.get_value() for path, leaf in flat_state(state)}


def flat_state(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the variables of a Flax state with their paths, in the order of ``to_flat_state``.

    Flax's function leaves a reference cycle, which keeps the arrays in memory for many rounds.
    ``nnx.filter_state`` does so, too; ``filtered`` does not.
    """
    for key in sorted(state):
        value = state[key]
        if isinstance(value, Mapping):
            yield from flat_state(value, (*path, key))
        else:
            yield (*path, key), value


def filtered(state: Any, chosen: Any) -> Any:
    """Return the part of a Flax state that a filter selects."""
    selects = nnx.filterlib.to_predicate(chosen)
    return nnx.from_flat_state(one for one in flat_state(state) if selects(*one))


def tensor_name(path: tuple[Any, ...]) -> str:
    """Return a tensor's name on the wire: its path in the model, joined by ``/``."""
    return "/".join(map(str, path))
