"""A Flax model taken apart: what travels, what stays here, what never changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fluffle_common.errors import TaskError
from fluffle_common.tensors.weights import Array
from fluffle_worker.local.optax import named, tensor_name

AVERAGED = nnx.Any(nnx.Param, nnx.BatchStat)
"""What training changes, and may travel."""


class AtHome(NamedTuple):
    """What does not travel, as the model's own initializer makes it.

    Args:
        personal: trained here, and kept from round to round.
        frozen: as it was made.
        rest: what is neither parameter nor running statistic, such as dropout's random state; it
            begins anew in each round.
    """

    personal: Any
    frozen: Any
    rest: Any


class ModelParts:
    """Takes a model apart by two filters, and puts it together.

    Args:
        model: ``(rngs) -> module``.
        federated: a Flax filter of the tensors that may travel.
        frozen: a Flax filter of those that neither travel nor train.

    Raises:
        TaskError: if nothing travels, nothing trains, or two tensors have one name.
    """

    def __init__(
        self, model: Callable[[nnx.Rngs], nnx.Module], federated: Any, frozen: Any
    ) -> None:
        self._frozen = nnx.All(AVERAGED, frozen)
        self._federated = nnx.All(AVERAGED, nnx.Not(frozen), federated)
        # Its form is known without making it; and made, it is in one piece, not operation by
        # operation, each of which would be compiled by itself.
        compiled: Callable[[Any], Any] = jax.jit
        try:
            like = nnx.eval_shape(lambda: model(nnx.Rngs(0)))
        except jax.errors.JAXTypeError:  # it looks at its own values while it is made
            like, compiled = model(nnx.Rngs(0)), lambda make: make
        self._graph, travelling, at_home = self._split(like)
        self.form = nnx.to_flat_state(travelling)
        self._personal_form = nnx.to_flat_state(at_home.personal)
        self._check(
            [*self.form, *self._personal_form], named(nnx.filter_state(nnx.state(like), AVERAGED))
        )
        # A trained state as JAX flattens it: taking it apart by way of Flax takes as long as a
        # training step of a small model, and leaves reference cycles that hold the arrays.
        labelled = nnx.merge_state(_labelled(self.form), _labelled(self._personal_form))
        self._names, self._tree = jax.tree.flatten(labelled)
        self._travel, self._stay = _names(self.form), _names(self._personal_form)
        self.at_home: AtHome = compiled(lambda: self._split(model(nnx.Rngs(0)))[2])()
        self._first_personal = named(self.at_home.personal)
        self._init = compiled(lambda key: self._split(model(nnx.Rngs(key)))[1])

    @property
    def has_statistics(self) -> bool:
        """Whether there are running statistics, as of batch normalization."""
        flat = [*self.form, *self._personal_form, *nnx.to_flat_state(self.at_home.frozen)]
        return any(isinstance(leaf, nnx.BatchStat) for _, leaf in flat)

    def init(self, key: Any) -> dict[str, Array]:
        """Return the tensors of a new model that travel, by name."""
        return {name: np.asarray(array) for name, array in named(self._init(key)).items()}

    def learnt(self, weights: Mapping[str, Array], personal: Mapping[str, Array]) -> Any:
        """Return the state of all that is trained here: what came, and what was kept.

        The arrays are those that are given; a compiled function takes them to its device.
        """
        arrays = {**(personal or self._first_personal), **weights}
        return jax.tree.unflatten(self._tree, [arrays[name] for name in self._names])

    def travelling(self, learnt: Any) -> dict[str, Array]:
        """Return the part of a trained state that travels, by name."""
        return self._arrays(learnt, self._travel)

    def personal(self, learnt: Any) -> dict[str, Array]:
        """Return the part of a trained state that stays here, by name."""
        return self._arrays(learnt, self._stay)

    def _arrays(self, learnt: Any, names: list[str]) -> dict[str, Array]:
        arrays = dict(zip(self._names, jax.tree.leaves(learnt), strict=True))
        return {name: np.asarray(arrays[name]) for name in names}

    def module(self, learnt: Any, frozen: Any, rest: Any) -> Any:
        """Return the model of these states."""
        return nnx.merge(self._graph, learnt, frozen, rest, copy=True)

    def after(self, module: Any) -> tuple[Any, Any]:
        """Return the running statistics of a model that was trained, and its rest."""
        _, others = nnx.split_state(nnx.state(module), nnx.Any(self._frozen, nnx.Param), ...)
        statistics, rest = nnx.split_state(others, nnx.BatchStat, ...)
        return statistics, rest

    def _split(self, model: Any) -> tuple[Any, Any, AtHome]:
        split: Any = nnx.split(model, self._frozen, self._federated, AVERAGED, ...)
        graph, frozen, travelling, personal, rest = split
        return graph, travelling, AtHome(personal, frozen, rest)

    def _check(self, trained: list[Any], all_named: Mapping[str, Any]) -> None:
        names = ", ".join(list(all_named)[:8]) + (", …" if len(all_named) > 8 else "")
        if not self.form:
            raise TaskError(
                "federated= and frozen= leave no tensor of the model to send; the model has "
                f"{names}"
            )
        if not any(isinstance(leaf, nnx.Param) for _, leaf in trained):
            raise TaskError(
                f"frozen= leaves no parameter of the model to train; the model has {names}"
            )
        _check_names(_names(trained))


def _labelled(form: Any) -> Any:
    """Return a state with the names of its tensors instead of their arrays."""
    return nnx.from_flat_state([(path, leaf.replace(tensor_name(path))) for path, leaf in form])


def _names(form: Any) -> list[str]:
    return [tensor_name(path) for path, _ in form]


def _check_names(names: list[str]) -> None:
    """Check that each tensor has a name of its own.

    Raises:
        TaskError: naming the first that has not.
    """
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise TaskError(
            f"two tensors of the model are called '{twice[0]}', such as one whose own name has a "
            "'/' in it and one inside another module; rename one of them"
        )
