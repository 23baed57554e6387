"""A compiled training step whose state goes in and out as a plain list of arrays.

Taking a Flax state apart and putting it together at every call costs as much as a small model's
step itself. Here it happens only when the step is compiled. For small dense models, handing each
step to the device still costs more than the step: many of them go there in one call.
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

# The most steps in one call, after which progress is reported, and the largest step that is worth
# it: a millisecond or two of arithmetic.
_TOGETHER = 16
_SMALL_FLOPS = 50e6
# XLA computes these 3 to 6 times slower in a loop of its own, on a CPU.
_SLOW_IN_A_LOOP = "stablehlo.convolution"


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


class FlatStep:
    """A compiled step.

    Args:
        step: ``(learning_rate, state, frozen, source, batch, key) -> (state, loss)``, of trees; at
            each step it gets the training's key with the step's number folded in.
        static_rate: compile it anew for each learning rate.
    """

    def __init__(self, step: Callable[..., Any], *, static_rate: bool) -> None:
        self._step = step
        static = (0, 1) if static_rate else (1,)
        self._one = jax.jit(self._on_leaves, static_argnums=static)
        self._many = jax.jit(self._loop, static_argnums=static)
        self._small: dict[Any, bool] = {}

    def run(  # noqa: PLR0917 - as the step itself has them
        self, rate: Any, state: Flat, frozen: Flat, source: Any, batches: Iterator[Any], key: Any
    ) -> Iterator[tuple[Flat, Sequence[Any]]]:
        """Train on all batches, and yield the state after every call, with the losses of its steps.

        Args:
            rate: the learning rate.
            state: what changes.
            frozen: what does not.
            source: what the batches are indices of; None if they are examples themselves.
            batches: index arrays of one size, or examples.
            key: of everything random.

        Raises:
            TaskError: if the step changes the form of its state.
        """
        forms, leaves, done = (state.form, frozen.form), state.leaves, 0
        first = next(batches, None)
        if first is None:
            return
        batches = itertools.chain([first], batches)
        args = rate, forms, leaves, frozen.leaves, source
        if source is not None and self._is_small(args, first, key):
            while chunk := list(itertools.islice(batches, _TOGETHER)):
                indices = np.resize(np.stack(chunk), (_TOGETHER, *first.shape))
                leaves, losses = self._many(
                    rate, forms, leaves, frozen.leaves, source, indices, key, done, len(chunk)
                )
                done += len(chunk)
                yield Flat(leaves, state.form), list(np.asarray(losses)[: len(chunk)])
            return
        for done, batch in enumerate(batches, start=1):
            number = np.int32(done)
            leaves, loss = self._one(rate, forms, leaves, frozen.leaves, source, batch, key, number)
            yield Flat(leaves, state.form), [loss]

    def _is_small(self, args: tuple[Any, ...], batch: Array, key: Any) -> bool:
        """Whether handing a step over costs about as much as the step, and a loop costs nothing.

        It depends on the step and its shapes alone: on every machine, and in a simulation, the
        same training has the same bits.
        """
        which = args[1], batch.shape
        if which not in self._small:
            lowered = self._one.lower(*args, batch, key, np.int32(1))
            flops = (lowered.cost_analysis() or {}).get("flops", _SMALL_FLOPS)
            small = flops < _SMALL_FLOPS and _SLOW_IN_A_LOOP not in lowered.as_text()
            after, _ = lowered.out_info
            self._small[which] = small and [_kind(one) for one in after] == [
                _kind(one) for one in args[2]
            ]
        return self._small[which]

    def _on_leaves(  # noqa: PLR0917 - all of them traced, or static, by position
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
        before, kept = Flat(leaves, forms[0]), Flat(frozen, forms[1])
        key = jax.random.fold_in(key, number)
        state, loss = self._step(rate, before.tree(), kept.tree(), source, batch, key)
        after = Flat.of(state)
        if after.form != before.form:
            raise TaskError(
                "a training step changes what the state of the model or of its optimizer is made "
                "of; create all variables in the model's __init__"
            )
        return after.leaves, loss

    def _loop(  # noqa: PLR0917 - as above
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
        """Do ``count`` steps after those that are done."""

        def one(at: Any, carry: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
            leaves, losses = carry
            number = jnp.asarray(done + at + 1, jnp.int32)
            leaves, loss = self._one(rate, forms, leaves, frozen, source, batches[at], key, number)
            return leaves, losses.at[at].set(loss)

        found: tuple[list[Any], Any] = jax.lax.fori_loop(
            0, count, one, (leaves, jnp.zeros(len(batches)))
        )
        return found


def _kind(array: Any) -> tuple[Any, Any]:
    return jnp.shape(array), jnp.result_type(array)
