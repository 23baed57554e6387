"""Adapter that makes a task from a Flax NNX model; the training step is compiled once.

By default, every ``nnx.Param`` and every ``nnx.BatchStat`` travels and is averaged by name. Running
statistics are included because a model with batch normalization degrades when each worker keeps its
own. The state of random number generators, such as dropout's, never travels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fluffle_common.cli.settings import cache_folder
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.groups import select_tensors
from fluffle_common.tensors.weights import Array, Weights, same_form
from fluffle_worker.local.base import LocalRule
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.loading import bound_rule
from fluffle_worker.task import Progress, TrainResult, work_of
from fluffle_worker.tasks.adapted import AdaptedTask, Loss, StepLosses
from fluffle_worker.tasks.checks import (
    as_metrics,
    as_rate,
    check_function,
    check_pair,
    checked_array,
)
from fluffle_worker.tasks.examples import Examples, Stream, call
from fluffle_worker.tasks.flat_step import Flat, FlatStep
from fluffle_worker.tasks.model_parts import ModelParts, filtered, flat_state, named, tensor_name

Augment = Callable[[jax.Array, Any], Any]
_NOTHING = np.zeros(0)


class FlaxTask(AdaptedTask):
    """A task that trains and evaluates a Flax model.

    Every round starts with a new optimizer state. A worker therefore keeps nothing between rounds,
    and a restart changes no result, unless the local rule keeps state or some tensors are personal.

    The task declares ``only_reads`` because JAX never writes to the arrays it is given, so that it
    receives views of the weights instead of copies.

    Args:
        model: ``(rngs) -> module``. The module is called with a batch of inputs; a dict of arrays
            is passed by keyword, a tuple or list by position.
        loss: ``(outputs, targets) -> losses``, one per example, shape [batch], or one number for
            the whole batch.
        optimizer: any optax transformation, or a function of the learning rate such as
            ``optax.adam``; the coordinator's ``--learning-rate`` applies to the latter only.
        train_data: (inputs, targets), each an array or a dict, tuple or list of arrays, with the
            same first axis; for data larger than memory, ``(epoch, rng) -> batches`` of such pairs.
        valid_data: held-out arrays of the same structure. If None, this worker does not evaluate.
        learning_rate: the rate for an ``optimizer`` that takes one, if the plan sets none.
        metrics: further functions with the signature of ``loss``, such as
            ``{"accuracy": accuracy}``. One that returns one number is called with all held-out
            examples at once.
        augment: ``(key, inputs) -> inputs``, a random change to each training batch.
        classes: the names of a classifier's outputs.
        sample_seed: decorrelates this worker's batches from those of other workers.
        local_rule: a change to each gradient before the optimizer sees it: a rule, or the name of
            one, such as ``"proximal:0.1"``.
        federated: a Flax filter of the tensors that travel. The others are personal: each worker
            trains its own and keeps them between the rounds of a run, in its state folder too.
        frozen: a Flax filter of the tensors that neither travel nor train. Every worker has them
            as ``model(nnx.Rngs(0))`` initializes them, unless they are shared.
        share_frozen: whether the frozen tensors are the federation's: those of the coordinator's
            ``--init`` or of the first worker. Each worker that lacks them is sent them once.
        num_examples: the number of examples in an epoch of streamed data.
        score_trained: whether to evaluate the model on ``valid_data`` after local training too.
            The update then carries the metrics ``personal_loss`` and so on, to compare with the
            evaluation of the model as received.

    Raises:
        TaskError: if an argument is unusable, or a filter leaves nothing to its purpose.
        UsageError: if ``local_rule`` names no rule, or is none.
    """

    _as_array, _map_arrays = staticmethod(np.asarray), staticmethod(jax.tree.map)
    _map_trees, _concatenate = _map_arrays, staticmethod(jnp.concatenate)

    def __init__(
        self,
        model: Callable[[nnx.Rngs], nnx.Module],
        loss: Loss,
        optimizer: optax.GradientTransformation | Callable[[float], optax.GradientTransformation],
        train_data: Examples | Stream,
        valid_data: Examples | None = None,
        *,
        learning_rate: float = 1e-3,
        metrics: Mapping[str, Loss] | None = None,
        augment: Augment | None = None,
        classes: tuple[str, ...] = (),
        sample_seed: int = 0,
        local_rule: LocalRule[Any] | str | None = None,
        federated: Any = True,
        frozen: Any = False,
        share_frozen: bool = False,
        num_examples: int | None = None,
        score_trained: bool = False,
    ) -> None:
        keep_compiled()
        if not isinstance(optimizer, optax.GradientTransformation):
            check_function("optimizer", optimizer, "an optax optimizer, such as optax.adam")
        check_function("loss", loss, "a function of the outputs and targets")
        self.classes, self.local_rule = classes, bound_rule(local_rule)
        self._loss, self._metrics, self._augment = loss, as_metrics(metrics), augment
        self._optimizer, self._learning_rate = optimizer, as_rate(learning_rate)
        self._score_trained = score_trained
        self._take_examples(train_data, valid_data, num_examples, sample_seed)
        self._parts = ModelParts(model, federated, frozen)
        self.statistics = self._parts.statistics
        self._share_frozen(share_frozen)
        self._steps: dict[tuple[int, Any], FlatStep] = {}
        self._forward = jax.jit(self._forward_step)

    def model_form(self) -> dict[str, Any]:
        """Return the names, shapes and dtypes of the tensors that travel."""
        return {tensor_name(path): leaf.get_value() for path, leaf in self._parts.form}

    def frozen(self) -> Weights:
        """Return the frozen tensors."""
        return self._parts.frozen()

    def use_frozen(self, tensors: Weights) -> None:
        """Replace the frozen tensors with those of the federation."""
        self._parts.use_frozen(tensors)

    def init(self, seed: int) -> Weights:
        """Return initial weights, determined by ``seed``."""
        return self._parts.init(_key_of(seed))

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """Train from ``weights`` and return the result; see ``task.Task.train``.

        Raises:
            TaskError: if the local rule needs the gradient of each example and the model has batch
                normalization.
            ValueError: if ``weights`` do not fit this model.
        """
        self.check(weights)
        parts, data, rule = self._parts, self._data, self.local_rule
        rule.check_batches(mixed=parts.has_statistics)
        learnt = parts.learnt(weights, self._personal.before(work_of(plan)))
        trained = _trained(plan)
        params = filtered(learnt, trained)
        # Mixed, because a sum would be that of another worker in another round.
        mixed = np.random.default_rng([plan.seed, self._sample_seed]).integers(2**63)
        key = _key_of(int(mixed))
        frozen, rest = parts.at_home.frozen, parts.seeded(key)
        learning_rate = plan.learning_rate or self._learning_rate
        step, steps = self._step(plan, params), data.steps(plan)
        losses = StepLosses(progress, steps, private=rule.per_example)
        calls = step.run(
            learning_rate,
            Flat.of((learnt, rest, self._transform(rule, learning_rate).init(params))),
            Flat.of(frozen),
            data.source,
            data.batches(plan),
            key,
        )
        for after, found in calls:
            state = after
            for loss in found:
                losses.add(loss)
        learnt, _, optimizer_state = state.tree()
        if not rule.changes_nothing:
            rule.end(named(filtered(learnt, trained)), optimizer_state[0])
        return self._result(plan, *parts.trained(learnt), losses)

    def _scores(self, weights: Weights, personal: Weights) -> dict[str, float]:
        states = jax.device_put(self._states(weights, personal))  # once, not with each batch

        def outputs_of(rows: Array) -> tuple[Any, Any]:
            inputs, targets = _picked(self._valid, rows)
            return self._forward(*states, inputs), targets

        return self._means(outputs_of)

    def _on_device(self, data: Examples, what: str) -> Any:
        """Return (inputs, targets) on the device, if each target is the index of a class.

        For another, JAX would compute a loss of NaN or, if the index is negative, that of a class.
        """
        check_pair(data, what)
        inputs, targets = jax.tree.map(lambda part: checked_array(part, what), tuple(data))
        count = len(self.classes) if hasattr(self.classes, "__len__") else 0
        are_labels = getattr(targets, "ndim", 0) == 1 and jnp.issubdtype(targets.dtype, jnp.integer)
        if count and are_labels:
            least, most = int(targets.min(initial=0)), int(targets.max(initial=0))
            if least < 0 or most >= count:
                raise TaskError(
                    f"{what} contains the target {least if least < 0 else most}, but classes= has "
                    f"{count} names, for the targets 0 to {count - 1}; list all classes"
                )
        return jax.device_put((inputs, targets))

    def check(self, weights: Weights) -> None:
        """Raise ValueError if ``weights`` differ from the model in names, shapes or dtypes."""
        same_form(weights, self.model_form())

    def outputs(self, weights: Weights, inputs: Any) -> Array:
        """Return the model's outputs for a batch of inputs, shape [batch, …]."""
        return np.asarray(self._forward(*self._states(weights, self._latest_personal()), inputs))

    def _states(self, weights: Weights, personal: Weights) -> tuple[Any, Any, Any]:
        self.check(weights)
        _, frozen, rest = self._parts.at_home
        return self._parts.learnt(weights, personal), frozen, rest

    def _transform(self, rule: BoundRule, learning_rate: Any) -> optax.GradientTransformation:
        optimizer = self._optimizer
        if not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(learning_rate)
        return optimizer if rule.changes_nothing else optax.chain(_transformation(rule), optimizer)

    def _step(self, plan: Plan, params: Any) -> FlatStep:
        """Return the compiled step, one per local rule and set of trained tensors."""
        which = self.local_rule.key, plan.train
        if which not in self._steps:
            # A new function object per step: JAX would reuse the trace of an equal one. It holds
            # the rule, so that no later rule can have its key.
            own = functools.partial(self._train_step, self.local_rule, _trained(plan))
            static_rate = not _traces(self._optimizer, params)
            self._steps[which] = FlatStep(own, static_rate=static_rate)
        return self._steps[which]

    def _train_step(  # noqa: PLR0917 - jitted: positional, traced
        self,
        rule: BoundRule,
        trained: Any,
        learning_rate: Any,
        state: tuple[Any, Any, Any],
        frozen: Any,
        source: Any,
        batch: Any,
        key: Any,
    ) -> tuple[tuple[Any, Any, Any], Any]:
        learnt, rest, optimizer_state = state
        inputs, targets = _picked(source, batch)
        if self._augment is not None:
            inputs = self._augment(key, inputs)
        params, still, others = nnx.split_state(learnt, trained, nnx.Param, ...)

        def mean_loss(params: Any, examples: Examples) -> Any:
            model = self._parts.module(nnx.merge_state(params, still, others), frozen, rest)
            model.train()
            value = jnp.mean(self._loss(call(model, examples[0]), examples[1]))
            return value, self._parts.after(model, rest)

        grad = jax.value_and_grad(mean_loss, has_aux=True)
        if rule.per_example:
            grad = _each(grad)
        (value, (others, rest)), gradient = grad(params, (inputs, targets))
        transform = self._transform(rule, learning_rate)
        known: dict[str, Any] = {}
        if not rule.per_example:  # the optimizer must not see past such a rule's noise
            known = {
                "value": value,
                "grad": gradient,
                "value_fn": lambda at: mean_loss(at, (inputs, targets))[0],
            }
        change, optimizer_state = _updated(transform, gradient, optimizer_state, params, known)
        params = optax.apply_updates(params, change)
        return (nnx.merge_state(params, still, others), rest, optimizer_state), value

    def _forward_step(self, learnt: Any, frozen: Any, rest: Any, inputs: Any) -> Any:
        model = self._parts.module(learnt, frozen, rest)
        model.eval()
        return call(model, inputs)


flax_task = FlaxTask
"""The public name, as in ``fluffle.flax_task``."""


def _transformation(rule: BoundRule) -> optax.GradientTransformation:
    """Return a rule as a transformation to chain before an optimizer; its state is the rule's."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changed, state = rule.gradient(named(gradient), named(params), state)
        flat = flat_state(gradient)
        leaves = [(path, leaf.replace(changed[tensor_name(path)])) for path, leaf in flat]
        return nnx.from_flat_state(leaves), state

    return optax.GradientTransformation(lambda params: rule.begin(named(params)), update)


def _key_of(seed: int) -> Any:
    """Return a random key that depends on all bits of a seed; JAX ignores those above 32."""
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def _picked(source: Any, batch: Any) -> Any:
    """Return the batch's examples: ``batch`` itself, or the rows of ``source`` that it indexes."""
    if source is None:
        return batch
    return jax.tree.map(lambda part: jnp.take(part, batch, axis=0), source)


def _trained(plan: Plan) -> Any:
    """Return a Flax filter of the parameters that ``plan`` trains."""
    if plan.train is None:
        return nnx.Param
    return nnx.All(
        nnx.Param, lambda path, _: bool(select_tensors({tensor_name(path): _NOTHING}, plan.train))
    )


def _each(grad: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``grad`` applied to each example on its own, as a batch of one."""

    def of_one(params: Any, example: Any) -> Any:
        return grad(params, jax.tree.map(lambda part: part[None], example))

    def of_all(params: Any, examples: Any) -> Any:
        (values, states), gradients = jax.vmap(of_one, in_axes=(None, 0))(params, examples)
        return (values.mean(), jax.tree.map(lambda part: part[0], states)), gradients

    return of_all


def _updated(
    transform: optax.GradientTransformation,
    gradient: Any,
    state: Any,
    params: Any,
    known: Mapping[str, Any],
) -> Any:
    """Return the change of ``params`` and the next state; an optimizer may need what is ``known``.

    Others, such as ``optax.contrib.sam``, refuse it.
    """
    try:
        return transform.update(gradient, state, params)
    except TypeError:
        return optax.with_extra_args_support(transform).update(gradient, state, params, **known)


def _traces(optimizer: Any, params: Any) -> bool:
    """Return whether an optimizer can be traced with the learning rate as an argument.

    If so, one compiled step serves all learning rates. If not, because the optimizer looks at the
    number (``if learning_rate > …``), the step is compiled anew for each rate.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return True

    def update(learning_rate: Any, params: Any) -> Any:
        made, loss = optimizer(learning_rate), jnp.zeros(())
        known = {"value": loss, "grad": params, "value_fn": lambda _: loss}
        return _updated(made, params, made.init(params), params, known)

    try:
        jax.eval_shape(update, 0.1, params)
    except Exception:  # a genuine error is raised again by the step itself
        return False
    return True


def keep_compiled() -> None:
    """Enable JAX's compilation cache on disk, unless the user has configured one."""
    try:
        cache = cache_folder()
    except UsageError:
        return  # no cache folder: compile every time
    config: Any = jax.config
    if not config.jax_compilation_cache_dir:
        config.update("jax_compilation_cache_dir", str(cache / "fluffle" / "jax"))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
