"""Adapter that makes a task from a PyTorch module.

A tensor has the name that it has in the module's ``state_dict``. By default, every parameter and
every persistent buffer travels and is averaged: running statistics too, because a model with batch
normalization degrades when each worker keeps its own, and integers such as its step counter. Tied
parameters travel once, under the first of their names. Boolean buffers, such as masks, do not
travel.
"""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from fluffle_common.cli.user_values import shown
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.weights import Array, Weights, same_form
from fluffle_common.user_errors import one_line
from fluffle_worker.local.base import LocalRule
from fluffle_worker.local.loading import bound_rule
from fluffle_worker.task import Progress, TrainResult, work_of
from fluffle_worker.tasks.adapted import AdaptedTask, Loss, StepLosses
from fluffle_worker.tasks.checks import (
    as_metrics,
    as_rate,
    check_filters,
    check_function,
    check_pair,
    checked_array,
)
from fluffle_worker.tasks.examples import Examples, Stream, call, mapped
from fluffle_worker.tasks.torch_tensors import (
    Filter,
    arrays_of,
    as_array,
    as_tensor,
    check_choice,
    check_no_loader,
    copies_of,
    copy_of,
    fill,
    selected,
    tensors_of,
    trained_by,
    untrained,
)

# Steps draw from torch's random state, which is global, so only one may be running in the process.
_random_state = threading.RLock()  # a user's function may use another task
# For each task's module, the parameters of the one that ``model`` made, if these are still in use.
# Not in the task, because a weak reference cannot be pickled.
_originals: weakref.WeakKeyDictionary[nn.Module, list[tuple[str, weakref.ref[nn.Parameter]]]]
_originals = weakref.WeakKeyDictionary()


class TorchTask(AdaptedTask):
    """A task that trains and evaluates a PyTorch module.

    Every training works on its own copy of the module, with a new optimizer. A worker therefore
    keeps nothing between rounds, and a restart changes no result, unless the local rule keeps state
    or some tensors are personal. On a CPU, equal seeds give equal results: each step seeds torch's
    random state, and restores it.

    Args:
        model: ``() -> module``, such as the module's class. The module is called with a batch of
            inputs; a dict of tensors is passed by keyword, a tuple or list by position.
        loss: ``(outputs, targets) -> losses``, one per example, shape [batch], or one number for
            the whole batch.
        optimizer: ``(parameters, lr=learning_rate) -> optimizer``, such as ``torch.optim.Adam``.
        train_data: (inputs, targets), each an array, a tensor, or a dict, tuple or list of them,
            with the same first axis; for data larger than memory, ``(epoch, rng) -> batches`` of
            such pairs.
        valid_data: held-out data of the same structure. If None, this worker does not evaluate.
        learning_rate: the learning rate, if the plan sets none.
        metrics: further functions with the signature of ``loss``, such as
            ``{"accuracy": accuracy}``. One that returns one number is called with all held-out
            examples at once.
        augment: ``inputs -> inputs``, a random change to each training batch.
        classes: the names of a classifier's outputs.
        sample_seed: decorrelates this worker's batches from those of other workers.
        local_rule: a change to each gradient before the optimizer sees it: a rule, or the name of
            one, such as ``"proximal:0.1"``.
        federated: selects the tensors that travel. The others are personal: each worker trains its
            own and keeps them between the rounds of a run, in its state folder too.
        frozen: selects the tensors that neither travel nor train; a parameter with
            ``requires_grad=False`` is always one of them. Every worker has them as ``model()``
            initializes them, unless they are shared.
        share_frozen: whether the frozen tensors are the federation's: those of the coordinator's
            ``--init`` or of the first worker. Each worker that lacks them is sent them once.
        num_examples: the number of examples in an epoch of streamed data.
        score_trained: whether to evaluate the model on ``valid_data`` after local training too.
        device: where to train; by default, on a CUDA device if there is one, else on the CPU.

    Raises:
        TaskError: if ``model`` makes no module, the arrays differ in length, or a filter leaves
            nothing to its purpose.
        UsageError: if ``local_rule`` names no rule, or is none.
    """

    _as_array = staticmethod(lambda values: as_array(torch.as_tensor(values)))
    _map_arrays, _map_trees = staticmethod(mapped), staticmethod(_pytree.tree_map)
    _concatenate = staticmethod(torch.cat)

    def __init__(
        self,
        model: Callable[[], nn.Module],
        loss: Loss,
        optimizer: Callable[..., Any],
        train_data: Examples | Stream,
        valid_data: Examples | None = None,
        *,
        learning_rate: float = 1e-3,
        metrics: Mapping[str, Loss] | None = None,
        augment: Callable[[Any], Any] | None = None,
        classes: tuple[str, ...] = (),
        sample_seed: int = 0,
        local_rule: LocalRule[Any] | str | None = None,
        federated: Filter = True,
        frozen: Filter = False,
        share_frozen: bool = False,
        num_examples: int | None = None,
        score_trained: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        check_function("optimizer", optimizer, "an optimizer's class, such as torch.optim.Adam")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_function("loss", loss, "a function of the outputs and targets")
        self.classes, self.local_rule = classes, bound_rule(local_rule)
        self._loss, self._metrics, self._augment = loss, as_metrics(metrics), augment
        self._optimizer, self._learning_rate = optimizer, as_rate(learning_rate)
        check_no_loader(train_data, valid_data)
        self._take_examples(train_data, valid_data, num_examples, sample_seed)
        self._model, self._score_trained = model, score_trained
        made = self._made(0)
        self._module = copy_of(made).to(self._device)
        params = dict(made.named_parameters())
        _originals[self._module] = [(name, weakref.ref(one)) for name, one in params.items()]
        self._travel, self._frozen = self._split(federated, frozen)
        self.statistics = self._travel - params.keys()
        self._share_frozen(share_frozen)

    def model_form(self) -> dict[str, Array]:
        """Return arrays with the names, shapes and dtypes of the tensors that travel."""
        tensors = tensors_of(self._module).items()
        # Nothing touches the memory of these arrays, so it is not used.
        empty = {name: torch.empty_like(one, device="cpu") for name, one in tensors}
        return {name: as_array(one) for name, one in empty.items() if name in self._travel}

    def frozen(self) -> Weights:
        """Return the frozen tensors."""
        return arrays_of(self._module, self._frozen.__contains__)

    def use_frozen(self, tensors: Weights) -> None:
        """Replace the frozen tensors with those of the federation."""
        # New memory: the arrays that frozen() has returned keep their values.
        for name, one in tensors_of(self._module).items():
            if name in tensors:
                one.data = as_tensor(tensors[name]).to(self._device)

    def init(self, seed: int) -> Weights:
        """Return initial weights, determined by ``seed``."""
        return arrays_of(self._made(seed), self._travel.__contains__)

    def train(self, weights: Weights, plan: Plan, progress: Progress) -> TrainResult:
        """Train from ``weights`` and return the result; see ``task.Task.train``.

        Raises:
            TaskError: if the plan trains no parameter, the local rule needs the gradient of each
                example and the model has batch normalization, or a gradient is that of the module
                of which the trained one is a copy.
            ValueError: if ``weights`` do not fit this model.
        """
        rule, data = self.local_rule, self._data
        module = self._filled(weights, self._personal.before(work_of(plan))).train()
        params = trained_by(plan, module)
        rule.check_batches(mixed=any(map(_mixes_examples, module.modules())))
        optimizer = self._optimizer(
            list(params.values()), lr=plan.learning_rate or self._learning_rate
        )
        state = None if rule.changes_nothing else rule.begin(copies_of(params))
        batches = data.batches(plan)
        losses = StepLosses(progress, data.steps(plan), private=rule.per_example)
        with self._original_refused():
            while True:
                with self._seeded(plan.seed, self._sample_seed, len(losses)):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    optimizer.zero_grad()
                    loss, state = self._differentiate(module, params, self._examples(batch), state)
                    optimizer.step()
                losses.add(loss)
        if not rule.changes_nothing:
            rule.end(copies_of(params), state)
        trained = arrays_of(module, self._travel.__contains__)
        personal = arrays_of(module, lambda name: name not in self._travel | self._frozen)
        return self._result(plan, trained, personal, losses)

    def _scores(self, weights: Weights, personal: Weights) -> dict[str, float]:
        # Not the module that was trained: training has changed its frozen statistics.
        module = self._filled(weights, personal).eval()

        def outputs_of(rows: Array) -> tuple[Any, Any]:
            # A copy, because the model may change its inputs in place.
            inputs, targets = mapped(operator.itemgetter(torch.from_numpy(rows)), self._valid)
            return call(module, inputs), targets

        with self._seeded(0), torch.no_grad():
            return self._means(outputs_of)

    def _on_device(self, data: Examples, what: str) -> Any:
        check_pair(data, what)

        def moved(part: Any) -> Any:
            part = checked_array(part, what)
            return (part if isinstance(part, torch.Tensor) else as_tensor(part)).to(self._device)

        return mapped(moved, data)

    def _differentiate(
        self, module: nn.Module, params: dict[str, Any], examples: Examples, state: Any
    ) -> tuple[Any, Any]:
        """Set the gradients that the optimizer uses; return the loss and the rule's next state."""
        rule, (inputs, targets) = self.local_rule, examples
        if rule.per_example:
            loss = 0.0
            gradients, value = _gradients_of_examples(module, params, self._loss, inputs, targets)
            if value.requires_grad and (outside := [one for _, one in self._originals_in_use()]):
                # The hooks of these tensors notice that the value depends on them.
                torch.autograd.grad(value.sum(), outside, retain_graph=True, allow_unused=True)
        else:
            value = _mean_loss(self._loss, call(module, inputs), targets)
            value.backward()
            loss, gradients = value.detach(), {name: one.grad for name, one in params.items()}
        if rule.changes_nothing:
            return loss, state
        given = {
            name: as_array(torch.zeros_like(params[name]) if one is None else one.to_dense())
            for name, one in gradients.items()
        }
        changed, state = rule.gradient(given, copies_of(params), state)
        for name, one in params.items():
            one.grad = as_tensor(np.array(changed[name])).to(one)
        return loss, state

    def _examples(self, batch: Any) -> Any:
        """Return a batch on the device, from indices or as the stream yields it."""
        if self._data.source is None:
            inputs, targets = self._on_device(batch, "a batch of train_data")
        else:
            rows = torch.from_numpy(batch).to(self._device)
            inputs, targets = mapped(operator.itemgetter(rows), self._data.source)
        return (inputs if self._augment is None else self._augment(inputs)), targets

    def _made(self, seed: int) -> nn.Module:
        """Return a new module, initialized with this seed."""
        with self._seeded(seed):
            made = None if isinstance(self._model, nn.Module) else self._model()
        if not isinstance(made, nn.Module):
            raise TaskError(
                f"model= is {self._model!r:.60}; expected a function that makes a module, such "
                "as the module's class or 'lambda: module'"
            )
        return made

    def _filled(self, weights: Weights, personal: Weights) -> nn.Module:
        """Return a copy of the module with these tensors; it shares the frozen parameters."""
        same_form(weights, self.model_form())
        tensors = tensors_of(self._module)
        frozen = [one for name, one in tensors.items() if name in self._frozen]
        shared = {id(one): one for one in frozen if isinstance(one, nn.Parameter)}
        module = copy_of(self._module, shared)
        fill(module, {**personal, **weights})
        return module

    def _split(self, federated: Filter, frozen: Filter) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of the tensors that travel, and of the frozen ones."""
        tensors = tensors_of(self._module)
        check_choice(tensors, federated=federated, frozen=frozen)
        params = {name: one for name, one in tensors.items() if isinstance(one, nn.Parameter)}
        still = {name for name in tensors if selected(frozen, name)}
        still |= untrained(self._module) & params.keys()
        travel = {name for name in tensors.keys() - still if selected(federated, name)}
        check_filters(
            list(tensors),
            sends=bool(travel),
            freezes=frozen is False or any(selected(frozen, name) for name in tensors),
            trains=not still >= params.keys(),
        )
        for name in still & params.keys():
            params[name].requires_grad_(False)
        return frozenset(travel), frozenset(still)

    def _originals_in_use(self) -> list[tuple[str, torch.Tensor]]:
        """Return the trainable parameters that are left of the module that ``model`` made."""
        return [
            (name, one)
            for name, ref in _originals.get(self._module, ())
            if (one := ref()) is not None and one.requires_grad and name not in self._frozen
        ]

    @contextmanager
    def _original_refused(self) -> Iterator[None]:
        """Refuse gradients of the module that ``model`` made, because they would train nothing."""

        def refuse(name: str, _: Any) -> None:
            raise TaskError(
                f"the model or the loss uses the tensor '{name}' of the module that model= made, "
                "but training changes only a copy of this module; call the layers only through "
                "self, never through another object or function, and never in loss="
            )

        hooks = [
            one.register_hook(functools.partial(refuse, name))
            for name, one in self._originals_in_use()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _seeded(self, *seed: int) -> Iterator[None]:
        """Seed torch's random state, and restore it afterwards."""
        number = int(np.random.default_rng(seed).integers(2**63))
        devices = [self._device] if self._device.type == "cuda" else []
        with _random_state, torch.random.fork_rng(devices):
            # torch.manual_seed, which seeds all devices, takes as long as a small model's step.
            torch.default_generator.manual_seed(number)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(number)
            yield


torch_task = TorchTask
"""The public name, as in ``fluffle.torch_task``."""


def _mean_loss(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Any:
    """Return the mean of what a user's loss function returns.

    Raises:
        TaskError: if it does not return a tensor.
    """
    losses = loss(outputs, targets)
    if not isinstance(losses, torch.Tensor):
        raise TaskError(f"loss= returned {shown(losses)}; expected a tensor")
    return losses.mean()


def _mixes_examples(layer: nn.Module) -> bool:
    """Whether a layer normalizes each example with the statistics of its batch."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


def _gradients_of_examples(
    module: nn.Module,
    params: dict[str, Any],
    loss: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
) -> tuple[dict[str, Any], Any]:
    """Return the gradients and the losses of the examples of a batch, of shape [batch, …].

    Raises:
        TaskError: if ``torch.func.vmap`` fails, for example because it lacks a layer of the model.
    """

    def of_example(values: Any, *example: Any) -> Any:
        def model(*args: Any, **named: Any) -> Any:
            return torch.func.functional_call(module, values, args, named)

        one, target = mapped(operator.itemgetter(None), example)
        return _mean_loss(loss, call(model, one), target)

    grad = torch.func.grad_and_value(of_example)
    each = torch.func.vmap(grad, in_dims=(None, 0, 0), randomness="same")
    values = {name: one.detach() for name, one in params.items()}
    try:
        gradients, losses = each(values, inputs, targets)
    except RuntimeError as why:
        raise TaskError(
            "the local rule needs the gradient of each example, but torch.func.vmap cannot compute "
            f"it ({one_line(why)}); if it does not support a layer, use another layer"
        ) from why
    return gradients, losses
