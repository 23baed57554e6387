"""The gradient of each example of a batch, for a PyTorch module."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fluffle_common.cli.user_values import shown
from fluffle_common.errors import TaskError
from fluffle_common.user_errors import one_line
from fluffle_worker.tasks.examples import call, mapped


def mean_loss(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Any:
    """Return the mean of what a user's loss function returns.

    Raises:
        TaskError: if it does not return a tensor.
    """
    losses = loss(outputs, targets)
    if not isinstance(losses, Tensor):
        raise TaskError(f"loss= returned {shown(losses)}; expected a tensor")
    return losses.mean()


def mixes_examples(layer: nn.Module) -> bool:
    """Return whether a layer normalizes each example with the statistics of its batch."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


def gradients_of_examples(
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
        return mean_loss(loss, call(model, one), target)

    grad = torch.func.grad_and_value(of_example)
    each = torch.func.vmap(grad, in_dims=(None, 0, 0), randomness="same")
    values = {name: one.detach() for name, one in params.items()}
    try:
        gradients, losses = each(values, inputs, targets)
    except RuntimeError as why:
        raise TaskError(
            "the local rule needs the gradient of each example, but torch.func.vmap cannot compute "
            f"it ({one_line(why)}); if a layer of the model does not support torch.func.vmap, use "
            "another layer"
        ) from why
    return gradients, losses
