"""Split of a Flax model's state into tensors that travel, personal, frozen and other ones."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from fluffle_common.errors import TaskError
from fluffle_common.tensors.weights import Array
from fluffle_worker.tasks.checks import check_filters

_EXPECTED = "expected an nnx.Module; wrap a flax.linen module in nnx.bridge.ToNNX (docs/tasks.md)"
AVERAGED = nnx.Any(nnx.Param, nnx.BatchStat)
"""Flax filter of the tensors that training changes and that may travel."""

# Variables that training may change although they are reset at the start of each training.
_RESET = (nnx.RngState, nnx.Intermediate, nnx.Cache)


class AtHome(NamedTuple):
    """The state that does not travel, as ``model(nnx.Rngs(0))`` initializes it."""

    personal: Any  # trained here and kept between rounds
    frozen: Any  # never trained; replaced by ``use_frozen`` alone
    # Neither parameters nor running statistics, such as dropout's random state; reset at the start
    # of each training, for which ``seeded`` changes the random state.
    rest: Any


class ModelParts:
    """The parts of a model, split by two Flax filters, and the way to merge them again.

    Args:
        model: ``(rngs) -> module``.
        federated: the filter of the tensors that travel.
        frozen: the filter of the tensors that neither travel nor train.

    Raises:
        TaskError: if no tensor travels, no parameter trains, or two tensors share a name.
    """

    def __init__(
        self, model: Callable[[nnx.Rngs], nnx.Module], federated: Any, frozen: Any
    ) -> None:
        if isinstance(model, nnx.Module) or not callable(model):
            raise TaskError(
                f"model= is of type {type(model).__name__}; expected a function that makes a "
                "module from rngs, such as the module's class or 'lambda rngs: Module(rngs=rngs)'"
            )
        if isinstance(model, linen.Module) or linen.Module in getattr(model, "__mro__", ()):
            raise TaskError(f"model= is a flax.linen module; {_EXPECTED}")
        self._frozen = nnx.All(AVERAGED, frozen)
        self._federated = nnx.All(AVERAGED, nnx.Not(frozen), federated)
        # eval_shape finds the shapes without computing anything. Initialization is jitted as a
        # whole: run eagerly, each of its operations would be compiled separately.
        compiled: Callable[[Any], Any] = jax.jit
        try:
            like = nnx.eval_shape(lambda: _traced(model))
        except jax.errors.JAXTypeError:  # the initializer needs values: run eagerly
            like, compiled = _made(model), lambda make: make
        self._graph, travelling, at_home = self._split(like)
        self.form = list(flat_state(travelling))
        self.statistics = _names([x for x in self.form if isinstance(x[1], nnx.BatchStat)])
        self._personal_form = list(flat_state(at_home.personal))
        self._frozen_form = list(flat_state(at_home.frozen))
        self._check(frozen, named(nnx.filter_state(nnx.state(like), AVERAGED)))
        # The order of a trained state's leaves. Taking a state apart with Flax takes as long as a
        # step of a small model, and leaves reference cycles that keep the arrays alive.
        labelled = nnx.merge_state(_labelled(self.form), _labelled(self._personal_form))
        self._names, self._tree = jax.tree.flatten(labelled)
        self._personal = _names(self._personal_form)
        self.at_home: AtHome = compiled(lambda: self._split(model(nnx.Rngs(0)))[2])()
        self._first_personal = named(self.at_home.personal)
        self._init = compiled(lambda key: self._split(model(nnx.Rngs(key)))[1])
        has_keys = any(map(_is_key, jax.tree.leaves(self.at_home.rest)))
        self._seeded = jax.jit(_with_keys_from) if has_keys else None

    @property
    def has_statistics(self) -> bool:
        """Whether the model has running statistics, such as those of batch normalization."""
        flat = [*self.form, *self._personal_form, *self._frozen_form]
        return any(isinstance(leaf, nnx.BatchStat) for _, leaf in flat)

    def init(self, key: Any) -> dict[str, Array]:
        """Return the tensors of a new model that travel, by name."""
        return _arrays(self._init(key))

    def learnt(self, weights: Mapping[str, Array], personal: Mapping[str, Array]) -> Any:
        """Return the state that trains here, from received weights and kept personal tensors.

        Its leaves are the given arrays; a compiled function moves them to its device. Personal
        tensors that were not kept are as initialized; kept ones that the model lacks are ignored.
        """
        arrays = {**self._first_personal, **personal, **weights}
        return jax.tree.unflatten(self._tree, [arrays[name] for name in self._names])

    def seeded(self, key: Any) -> Any:
        """Return the rest for a training, with random states that depend on the training's key.

        Otherwise all workers would draw the same dropout masks, in every round.
        """
        rest = self.at_home.rest
        return rest if self._seeded is None else self._seeded(rest, key)

    def trained(self, learnt: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the tensors of a trained state that travel, and the personal ones, by name."""
        leaves = zip(self._names, jax.tree.leaves(learnt), strict=True)
        arrays = {name: np.asarray(leaf) for name, leaf in leaves}
        personal = {name: arrays.pop(name) for name in self._personal}
        return arrays, personal

    def frozen(self) -> dict[str, Array]:
        """Return the frozen tensors, by name."""
        return _arrays(self.at_home.frozen)

    def use_frozen(self, arrays: Mapping[str, Array]) -> None:
        """Replace the frozen tensors that the model was initialized with."""
        values = jax.device_put([arrays[name] for name in _names(self._frozen_form)])
        filled = [
            (path, leaf.replace(value))
            for (path, leaf), value in zip(self._frozen_form, values, strict=True)
        ]
        self.at_home = self.at_home._replace(frozen=nnx.from_flat_state(filled))

    def module(self, learnt: Any, frozen: Any, rest: Any) -> Any:
        """Return the module merged from these states."""
        return nnx.merge(self._graph, learnt, frozen, rest, copy=True)

    def after(self, module: Any, before: Any) -> tuple[Any, Any]:
        """Return a trained module's running statistics and its remaining state.

        Called while JAX traces; ``before`` is the remaining state that the module began with.

        Raises:
            TaskError: if training changes something that would be reset before the next round.
        """
        _, others = nnx.split_state(nnx.state(module), nnx.Any(self._frozen, nnx.Param), ...)
        statistics, rest = nnx.split_state(others, nnx.BatchStat, ...)
        old = dict(nnx.to_flat_state(before))
        for path, leaf in nnx.to_flat_state(rest):
            if path not in old or isinstance(leaf, _RESET):
                continue
            if not all(map(operator.is_, jax.tree.leaves(leaf), jax.tree.leaves(old[path]))):
                raise TaskError(
                    f"training changes '{tensor_name(path)}', which is neither an nnx.Param nor an "
                    "nnx.BatchStat, so it would be neither sent nor kept; make it an nnx.BatchStat "
                    "to have it averaged, or an nnx.Intermediate to have it reset in each round"
                )
        return statistics, rest

    def _split(self, model: Any) -> tuple[Any, Any, AtHome]:
        split: Any = nnx.split(model, self._frozen, self._federated, AVERAGED, ...)
        graph, frozen, travelling, personal, rest = split
        return graph, travelling, AtHome(personal, frozen, rest)

    def _check(self, frozen: Any, all_named: Mapping[str, Any]) -> None:
        trained = [*self.form, *self._personal_form]
        params = [(path, leaf) for path, leaf in trained if isinstance(leaf, nnx.Param)]
        check_filters(
            list(all_named),
            sends=bool(self.form),
            freezes=frozen is False or bool(self._frozen_form),
            trains=bool(params),
        )
        for path, leaf in params:
            dtype = leaf.get_value().dtype
            if not jnp.issubdtype(dtype, jnp.inexact):
                raise TaskError(
                    f"parameter '{tensor_name(path)}' is {dtype}, which cannot be trained; "
                    "store it in an nnx.Variable that is not an nnx.Param, or freeze it with "
                    "frozen="
                )
        twice = [name for name, number in Counter(_names(trained)).items() if number > 1]
        if twice:
            raise TaskError(
                f"two tensors of the model have the name '{twice[0]}', because the name of a "
                "variable contains '/'; rename this variable"
            )


def _made(model: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    module = model(nnx.Rngs(0))
    if not isinstance(module, nnx.Module):
        raise TaskError(f"model= returned an object of type {type(module).__name__}; {_EXPECTED}")
    return module


def _traced(model: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """Return the module, made while JAX traces.

    Raises:
        JAXTypeError: if the initializer branches on a value, or an attribute is a traced array
            outside of a variable, which Flax takes for a constant.
    """
    module = _made(model)
    if any(isinstance(each, jax.core.Tracer) for _, each in nnx.iter_graph(module)):
        raise jax.errors.JAXTypeError("an attribute of the module is an array")
    return module


def arrays_of(module: nnx.Module, chosen: Any = True) -> dict[str, Array]:
    """Return the tensors that may travel and that a filter selects, as arrays by name."""
    return _arrays(nnx.state(module, nnx.All(AVERAGED, chosen)))


def untrained(_: nnx.Module) -> set[str]:
    """Return no names: only the filters of a task say which tensors of Flax are frozen."""
    return set()


def statistics(module: nnx.Module) -> set[str]:
    """Return the names of the running statistics."""
    return {*named(nnx.state(module, nnx.BatchStat))}


def _arrays(state: Any) -> dict[str, Array]:
    return {name: np.asarray(array) for name, array in named(state).items()}


def fill(module: nnx.Module, arrays: Mapping[str, Array]) -> None:
    """Set the tensors of a module that have one of these names."""
    filled = [
        (path, leaf.replace(jnp.asarray(arrays[tensor_name(path)])))
        for path, leaf in flat_state(nnx.state(module, AVERAGED))
        if tensor_name(path) in arrays
    ]
    nnx.update(module, nnx.from_flat_state(filled))


def named(state: Any) -> dict[str, Any]:
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


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key))


def _with_keys_from(state: Any, key: Any) -> Any:
    """Return a state with random bits of a key folded into each key in it."""
    bits = jax.random.bits(key, dtype=jnp.uint32)

    def folded(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        fold = jax.vmap(functools.partial(jax.random.fold_in, data=bits))
        return fold(leaf.reshape(-1)).reshape(leaf.shape)

    return jax.tree.map(folded, state)


def _labelled(form: Any) -> Any:
    """Return the Flax state of this form with tensor names as its leaves."""
    return nnx.from_flat_state([(path, leaf.replace(tensor_name(path))) for path, leaf in form])


def _names(form: Any) -> list[str]:
    return [tensor_name(path) for path, _ in form]
