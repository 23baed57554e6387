"""A compiled training step that takes and returns its state as a flat list of arrays.

Flattening and unflattening a Flax state at each call takes as long as a small model's step. Here
that happens only while the step is being traced. For a small dense model, dispatching a step still
takes longer than computing it, so several steps go into one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluffle_common.errors import TaskError
from fluffle_common.tensors.weights import Array

# The number of steps in one call. A larger step (from 1 to 2 ms on a core) gets a call of its own:
# that costs no more, and progress is reported sooner.
_TOGETHER = 16
_SMALL_FLOPS = 50e6
# On a CPU, XLA computes convolutions 3 to 6 times slower inside a loop.
_SLOW_IN_A_LOOP = "conv_general_dilated["


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


class FlatStep:
    """The compiled form of a step on trees.

    Args:
        step: ``(learning_rate, state, frozen, source, batch, key) -> (state, loss)``; it receives
            the key of the training with the number of the step folded in.
        static_rate: whether to compile it anew for each learning rate.
    """

    def __init__(self, step: Callable[..., Any], *, static_rate: bool) -> None:
        self._step = step
        # The donated leaves are overwritten, so that only one state is in memory.
        how: Any = {"static_argnums": (0, 1) if static_rate else (1,), "donate_argnums": 2}
        self._one = jax.jit(self._on_leaves, **how)
        self._several = jax.jit(self._loop, **how)
        self._small: dict[Any, bool] = {}

    def run(  # noqa: PLR0917 - the parameters of the step
        self, rate: Any, state: Flat, frozen: Flat, source: Any, batches: Iterator[Any], key: Any
    ) -> Iterator[tuple[Flat, Sequence[Any]]]:
        """Train on all batches; yield the state after each call, with the losses of its steps.

        A call reuses the memory of the state that was yielded before it. The step reads ``frozen``
        and does not change it. ``batches`` index ``source``, or are examples themselves if that is
        None.

        Raises:
            TaskError: if the step changes the structure of its state.
        """
        forms, done = (state.form, frozen.form), 0
        leaves = _copied(state.leaves)  # the caller's own must not be overwritten
        del state  # or it would stay in memory
        first = next(batches)
        batches = itertools.chain([first], batches)
        args = rate, forms, leaves, frozen.leaves, source
        if source is not None and self._is_small(args, first, key):
            while chunk := list(itertools.islice(batches, _TOGETHER)):
                indices = np.resize(np.stack(chunk), (_TOGETHER, *first.shape))
                leaves, losses = self._several(
                    rate, forms, leaves, frozen.leaves, source, indices, key, done, len(chunk)
                )
                done += len(chunk)
                yield Flat(leaves, forms[0]), list(np.asarray(losses)[: len(chunk)])
            return
        for done, batch in enumerate(batches, start=1):
            number = np.int32(done)
            leaves, loss = self._one(rate, forms, leaves, frozen.leaves, source, batch, key, number)
            yield Flat(leaves, forms[0]), [loss]

    def _is_small(self, args: tuple[Any, ...], batch: Array, key: Any) -> bool:
        """Whether dispatching a step takes about as long as the step, and a loop no longer.

        The answer depends only on the step and its shapes, so that a worker and a simulation
        compute a training in the same way.
        """
        which = args[1], batch.shape
        if which not in self._small:
            traced = self._one.trace(*args, batch, key, np.int32(1))
            small = [*map(_kind, traced.out_info[0])] == [*map(_kind, args[2])]
            if small := small and _SLOW_IN_A_LOOP not in str(traced.jaxpr):
                # Lowering takes half of the first call's time, and that call reuses the result.
                lowered = self._several.lower(*args, np.stack([batch] * _TOGETHER), key, 0, 1)
                # The analysis counts one step, because it does not know how often the loop runs.
                flops = (lowered.cost_analysis() or {}).get("flops", _SMALL_FLOPS)
                small = flops < _SMALL_FLOPS
            self._small[which] = small
        return self._small[which]

    def _on_leaves(  # noqa: PLR0917 - jitted: positional, static or traced
        self,
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
        state, loss = self._step(rate, before.tree(), constant.tree(), source, batch, key)
        after = Flat.of(state)
        if after.form != before.form:
            raise TaskError(
                "a training step changes the structure of the model or of the optimizer's state; "
                "create all variables in the model's __init__"
            )
        return after.leaves, loss

    def _loop(  # noqa: PLR0917 - jitted, too
        self,
        rate: Any,
        forms: tuple[Any, Any],
        leaves: list[Any],
        frozen: list[Any],
        source: Any,
        batches: Any,
        key: Any,
        done: Any,
        count: Any,
    ) -> tuple[list[Any], Any]:
        """Return the state and the losses after ``count`` steps; ``done`` came before them."""

        def one(at: Any, carry: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
            leaves, losses = carry
            number = jnp.asarray(done + at + 1, jnp.int32)
            leaves, loss = self._one(rate, forms, leaves, frozen, source, batches[at], key, number)
            return leaves, losses.at[at].set(loss)

        found: tuple[list[Any], Any] = jax.lax.fori_loop(
            0, count, one, (leaves, jnp.zeros(len(batches)))
        )
        return found


@jax.jit
def _copied(leaves: list[Any]) -> list[Any]:
    return [jnp.copy(leaf) for leaf in leaves]


def _kind(array: Any) -> tuple[Any, Any]:
    return jnp.shape(array), jnp.result_type(array)
