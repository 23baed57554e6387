"""A compiled training step whose state goes in and out as a plain list of arrays.

Taking a Flax state apart and putting it together at every call costs as much as a small model's
step itself. Here it happens only when the step is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fluffle_common.errors import TaskError


class Flat(NamedTuple):
    """A tree of arrays: its leaves, and what it is made of, which can be hashed."""

    leaves: list[Any]
    form: Any

    @classmethod
    def of(cls, tree: Any) -> Flat:
        """Take a tree apart."""
        return cls(*jax.tree.flatten(tree))

    def tree(self) -> Any:
        """Put it together again."""
        return jax.tree.unflatten(self.form, self.leaves)


def flat_step(step: Callable[..., Any], *, static_rate: bool) -> Callable[..., tuple[Flat, Any]]:
    """Compile a step.

    Args:
        step: ``(learning_rate, state, frozen, source, batch, key) -> (state, loss)``, of trees.
        static_rate: compile it anew for each learning rate.

    Returns:
        ``(learning_rate, state, frozen, source, batch, key, number) -> (state, loss)``, where both
        states are ``Flat``; the step gets ``key`` with ``number`` folded in.

    Raises:
        TaskError: from the returned function, if the step changes the form of its state.
    """

    def on_leaves(  # noqa: PLR0917 - all of them traced, or static, by position
        rate: Any,
        forms: tuple[Any, Any],
        leaves: list[Any],
        frozen: list[Any],
        source: Any,
        batch: Any,
        key: Any,
        number: Any,
    ) -> tuple[list[Any], Any]:
        before, kept = Flat(leaves, forms[0]), Flat(frozen, forms[1])
        key = jax.random.fold_in(key, number)
        state, loss = step(rate, before.tree(), kept.tree(), source, batch, key)
        after = Flat.of(state)
        if after.form != before.form:
            raise TaskError(
                "a training step changes what the state of the model or of its optimizer is made "
                "of; create all variables in the model's __init__"
            )
        return after.leaves, loss

    compiled = jax.jit(on_leaves, static_argnums=(0, 1) if static_rate else (1,))

    def call(  # noqa: PLR0917 - as the step itself has them
        rate: Any, state: Flat, frozen: Flat, source: Any, batch: Any, key: Any, number: int
    ) -> tuple[Flat, Any]:
        forms = state.form, frozen.form
        leaves, loss = compiled(
            rate, forms, state.leaves, frozen.leaves, source, batch, key, number
        )
        return Flat(leaves, state.form), loss

    return call
