"""A compiled training step that takes and returns its state as a flat list of arrays.

Flattening and unflattening a Flax state at each call takes as long as a small model's step. Here
that happens only while the step is being traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fluffle_common.errors import TaskError


class Flat(NamedTuple):
    """A flattened tree of arrays: the leaves and the hashable tree structure."""

    leaves: list[Any]
    form: Any

    @classmethod
    def of(cls, tree: Any) -> Flat:
        """Flatten a tree."""
        return cls(*jax.tree.flatten(tree))

    def tree(self) -> Any:
        """Return the tree."""
        return jax.tree.unflatten(self.form, self.leaves)


def flat_step(step: Callable[..., Any], *, static_rate: bool) -> Callable[..., tuple[Flat, Any]]:
    """Return the compiled form of a step on trees.

    Args:
        step: ``(learning_rate, state, frozen, source, batch, key) -> (state, loss)``.
        static_rate: whether to compile it anew for each learning rate.

    Returns:
        ``(learning_rate, state, frozen, source, batch, key, number) -> (state, loss)``, with
        ``state`` and ``frozen`` as ``Flat``. The step receives ``key`` with ``number`` folded in.
        The function raises ``TaskError`` if the step changes the structure of its state.
    """

    def on_leaves(  # noqa: PLR0917 - jitted: positional, static or traced
        rate: Any,
        forms: tuple[Any, Any],
        leaves: list[Any],
        frozen: list[Any],
        source: Any,
        batch: Any,
        key: Any,
        number: Any,
    ) -> tuple[list[Any], Any]:
        before, constant = Flat(leaves, forms[0]), Flat(frozen, forms[1])
        key = jax.random.fold_in(key, number)
        state, loss = step(rate, before.tree(), constant.tree(), source, batch, key)
        after = Flat.of(state)
        if after.form != before.form:
            raise TaskError(
                "a training step changes the structure of the model's or the optimizer's state; "
                "create all variables in the model's __init__"
            )
        return after.leaves, loss

    compiled = jax.jit(on_leaves, static_argnums=(0, 1) if static_rate else (1,))

    def call(  # noqa: PLR0917 - the parameters of the step
        rate: Any, state: Flat, frozen: Flat, source: Any, batch: Any, key: Any, number: int
    ) -> tuple[Flat, Any]:
        forms = state.form, frozen.form
        leaves, loss = compiled(
            rate, forms, state.leaves, frozen.leaves, source, batch, key, number
        )
        return Flat(leaves, state.form), loss

    return call
