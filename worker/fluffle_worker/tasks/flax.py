"""A task from a Flax model: the local epochs, compiled once, on any data that fits in memory.

What is averaged is every ``nnx.Param`` and every ``nnx.BatchStat``, by name: running statistics
that stay behind ruin a federated model with batch normalization. The state of random number
generators, such as dropout's, never travels.
"""

from __future__ import annotations

from collections import Counter
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
from fluffle_common.tensors.weights import Array, Weights, same_form
from fluffle_worker.local.base import LocalRule
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.optax import gradient_transformation, named, tensor_name
from fluffle_worker.task import EvalResult, Progress, TrainResult

Examples = tuple[Array, Array]
PerExample = Callable[[Any, Any], Any]
Augment = Callable[[jax.Array, Any], Any]
_EVALUATION_BATCH = 256
AVERAGED = nnx.Any(nnx.Param, nnx.BatchStat)


def accuracy(outputs: Any, targets: Any) -> Any:
    """Return 1 for each example whose largest output is its target, else 0; shape [batch]."""
    return (jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32)


class FlaxTask:
    """A task from a plain Flax model.

    JAX never writes to the arrays that it is given: the task gets views of the weights.

    The optimizer's state is fresh in every round: unless its local rule keeps something, a worker
    keeps nothing between rounds, so that one that was restarted, or joined late, does exactly what
    it would have done otherwise.

    Args:
        model: ``(rngs) -> module``; the module is called with a batch of inputs.
        loss: ``(outputs, targets) -> losses``, one for each example, shape [batch].
        optimizer: any optax transformation, or a function of the learning rate such as
            ``optax.adam``, which lets the coordinator's ``--learning-rate`` decide.
        train_data: (inputs, targets), arrays with the same first axis.
        valid_data: the same, held out; None: this worker does not evaluate.
        learning_rate: for an ``optimizer`` that takes one and a plan that names none.
        metrics: more numbers of the form of ``loss``, such as ``{"accuracy": accuracy}``.
        augment: ``(key, inputs) -> inputs``, random changes to a training batch.
        classes: the names of the outputs, for a classifier.
        sample_seed: makes this worker's batches its own.
        local_rule: changes each gradient before the optimizer sees it.
    """

    only_reads = True

    def __init__(
        self,
        model: Callable[[nnx.Rngs], nnx.Module],
        loss: PerExample,
        optimizer: optax.GradientTransformation | Callable[[float], optax.GradientTransformation],
        train_data: Examples,
        valid_data: Examples | None = None,
        *,
        learning_rate: float = 1e-3,
        metrics: Mapping[str, PerExample] | None = None,
        augment: Augment | None = None,
        classes: tuple[str, ...] = (),
        sample_seed: int = 0,
        local_rule: LocalRule[Any] | None = None,
    ) -> None:
        keep_compiled()
        self.num_examples = len(train_data[0])
        self.classes = classes
        self.local_rule = BoundRule(local_rule)
        self._loss, self._metrics = loss, dict(metrics or {})
        self._augment = augment
        self._optimizer, self._learning_rate = optimizer, learning_rate
        # On the device once: a batch is a gather there, not a copy from here.
        self._train = jax.device_put(train_data)
        self._valid = jax.device_put(valid_data) if valid_data and len(valid_data[0]) else None
        self._sample_seed = sample_seed
        # Its form is known without making it; and made, it is in one piece, not operation by
        # operation, each of which would be compiled by itself.
        compiled: Callable[[Any], Any] = jax.jit
        try:
            like = nnx.eval_shape(lambda: model(nnx.Rngs(0)))
        except jax.errors.JAXTypeError:  # it looks at its own values while it is made
            like, compiled = model(nnx.Rngs(0)), lambda make: make
        self._graph, averaged, _ = _split(like)
        self._form = nnx.to_flat_state(averaged)
        _check_names([tensor_name(path) for path, _ in self._form])
        self._rest = compiled(lambda: _split(model(nnx.Rngs(0)))[2])()
        self._init = compiled(lambda key: _split(model(nnx.Rngs(key)))[1])
        self._steps: dict[tuple[float, BoundRule], tuple[Any, Any]] = {}
        self._evaluate_batch = jax.jit(self._evaluate_step)
        self._forward = jax.jit(self._forward_step)

    def model_form(self) -> dict[str, Any]:
        """See ``task.Task``."""
        return {tensor_name(path): leaf.get_value() for path, leaf in self._form}

    def init(self, seed: int) -> Weights:
        """See ``task.Task``."""
        return _to_weights(self._init(jax.random.key(seed)))

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """See ``task.Task``."""
        transform, step = self._step(plan.learning_rate or self._learning_rate)
        state = self._to_state(weights)
        rest = self._rest
        optimizer_state = transform.init(nnx.filter_state(state, nnx.Param))
        batches = self._batches(plan)
        losses = []
        key = jax.random.key(plan.seed ^ self._sample_seed)
        for number, batch in enumerate(batches, start=1):
            state, rest, optimizer_state, loss = step(
                state, rest, optimizer_state, self._train, batch, jax.random.fold_in(key, number)
            )
            losses.append(loss)
            # JAX runs ahead; reading the loss of an earlier step keeps it from running far ahead
            # of what is reported, and costs nothing.
            seen = float(losses[-2]) if number > 1 else None
            progress(number, len(batches), seen)
        if not self.local_rule.changes_nothing:
            self.local_rule.end(named(nnx.filter_state(state, nnx.Param)), optimizer_state[0])
        mean = float(np.mean([float(loss) for loss in losses]))
        metrics = {"loss": mean, "steps": float(len(batches))}
        return TrainResult(_to_weights(state), self.num_examples, metrics)

    def evaluate(self, weights: Weights) -> EvalResult | None:
        """See ``task.Task``."""
        if self._valid is None:
            return None
        state = self._to_state(weights)
        count = len(self._valid[0])
        size = min(_EVALUATION_BATCH, count)
        totals: dict[str, float] = {}
        for start in range(0, count, size):
            # The last batch is filled up, so that all have one shape and are compiled once.
            wanted = np.arange(start, start + size)
            found = self._evaluate_batch(state, self._valid, np.minimum(wanted, count - 1))
            for name, values in found.items():
                real = np.asarray(values, np.float64)[wanted < count]
                totals[name] = totals.get(name, 0.0) + float(real.sum())
        means = {name: total / count for name, total in totals.items()}
        return EvalResult(means.pop("loss"), count, means)

    def check(self, weights: Weights) -> None:
        """Raise ValueError where these are not weights of this model."""
        same_form(weights, self.model_form())

    def outputs(self, weights: Weights, inputs: Array) -> Array:
        """Return the model's outputs for a batch of inputs, shape [batch, …]."""
        return np.asarray(self._forward(self._to_state(weights), inputs))

    def _batches(self, plan: Plan) -> list[Array]:
        """Return index arrays of one size: a fresh order each epoch, its last batch filled up.

        A last batch of another size would be compiled a second time; filling it up from the start
        of the epoch's order shows a few examples twice.
        """
        count = self.num_examples
        size = min(plan.batch_size, count)
        rng = np.random.default_rng([plan.seed, self._sample_seed])
        batches = []
        for _ in range(plan.epochs):
            order = rng.permutation(count).astype(np.int32)
            filled = np.resize(order, -(-count // size) * size)
            batches += np.split(filled, len(filled) // size)
        return batches

    def _step(self, learning_rate: float) -> tuple[Any, Any]:
        """Return the optimizer and its compiled step; one for each learning rate ever asked."""
        key_of_step = learning_rate, self.local_rule
        if key_of_step not in self._steps:
            optimizer = self._optimizer
            transform = (
                optimizer
                if isinstance(optimizer, optax.GradientTransformation)
                else optimizer(learning_rate)
            )
            if not self.local_rule.changes_nothing:
                transform = optax.chain(gradient_transformation(self.local_rule), transform)

            def step(  # noqa: PLR0917 - all of them traced, by position
                state: Any, rest: Any, optimizer_state: Any, data: Any, batch: Any, key: Any
            ) -> Any:
                inputs, targets = (jnp.take(part, batch, axis=0) for part in data)
                if self._augment is not None:
                    inputs = self._augment(key, inputs)
                params, others = nnx.split_state(state, nnx.Param, ...)

                def mean_loss(params: Any) -> Any:
                    model = nnx.merge(self._graph, params, others, rest, copy=True)
                    model.train()
                    value = self._loss(model(inputs), targets).mean()
                    return value, nnx.state(model)

                grad = jax.value_and_grad(mean_loss, has_aux=True)
                (value, after), gradient = grad(params)
                change, optimizer_state = transform.update(gradient, optimizer_state, params)
                params = optax.apply_updates(params, change)
                _, others, rest = nnx.split_state(after, nnx.Param, nnx.BatchStat, ...)
                return nnx.merge_state(params, others), rest, optimizer_state, value

            self._steps[key_of_step] = transform, jax.jit(step)
        return self._steps[key_of_step]

    def _forward_step(self, state: Any, inputs: Any) -> Any:
        model = nnx.merge(self._graph, state, self._rest, copy=True)
        model.eval()
        return model(inputs)

    def _evaluate_step(self, state: Any, data: Any, batch: Any) -> dict[str, Any]:
        inputs, targets = (jnp.take(part, batch, axis=0) for part in data)
        outputs = self._forward_step(state, inputs)
        functions = {"loss": self._loss, **self._metrics}
        return {name: function(outputs, targets) for name, function in functions.items()}

    def _to_state(self, weights: Weights) -> Any:
        self.check(weights)
        return nnx.from_flat_state(
            [
                (path, leaf.replace(jnp.asarray(weights[tensor_name(path)])))
                for path, leaf in self._form
            ]
        )


flax_task = FlaxTask
"""The name under which a user's task file calls it."""


def _split(model: Any) -> Any:
    return nnx.split(model, AVERAGED, ...)


def _to_weights(state: Any) -> dict[str, Array]:
    return {name: np.asarray(array) for name, array in named(state).items()}


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


def keep_compiled() -> None:
    """Keep what JAX compiles on disk, so that the next process on this machine need not."""
    try:
        cache = cache_folder()
    except UsageError:
        return  # it only takes longer
    config: Any = jax.config
    if not config.jax_compilation_cache_dir:
        config.update("jax_compilation_cache_dir", str(cache / "fluffle" / "jax"))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
