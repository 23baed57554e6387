"""The tensors of a PyTorch module by name, and their conversion to and from NumPy."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from fluffle_common.cli.user_values import shown
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import Plan
from fluffle_common.tensors.groups import select_tensors, tensors_of_model
from fluffle_common.tensors.weights import BFLOAT16, Array

Filter = Callable[[str], bool] | bool
"""Selects tensors by name: a function, or all or none of them."""


def selected(chosen: Filter, name: str) -> bool:
    """Return whether a filter selects the tensor with this name."""
    return bool(chosen(name) if callable(chosen) else chosen)


def check_choice(tensors: Mapping[str, Any], **filters: Any) -> None:
    """Check a module's tensors, and the options that select some of them.

    Raises:
        TaskError: if an option is no filter, because any text or list would be true and so select
            all tensors, or a tensor has no shape yet.
    """
    for option, chosen in filters.items():
        if not isinstance(chosen, bool) and not callable(chosen):
            raise TaskError(
                f"{option}= is {shown(chosen)}; expected True, False, or a function of a tensor's "
                "name, such as lambda name: name.startswith('head')"
            )
    for name, one in tensors.items():
        if is_lazy(one):
            raise TaskError(
                f"tensor '{name}' of the model has no shape yet, because its module is lazy; in "
                "the function that you give as model=, call the module once with a batch"
            )


def check_no_loader(train_data: Any, valid_data: Any) -> None:
    """Raise ``TaskError`` if a ``DataLoader`` stands where tensors or a stream are expected."""
    if isinstance(train_data, DataLoader):
        raise TaskError(
            "train_data is a DataLoader; pass 'lambda epoch, rng: iter(loader)' as train_data, "
            "with num_examples=len(loader.dataset), or pass the tensors"
        )
    if isinstance(valid_data, DataLoader):
        raise TaskError(
            "valid_data is a DataLoader; pass the tensors, such as the batch of a DataLoader with "
            "batch_size=len(dataset)"
        )


def tensors_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's parameters and persistent buffers; tied ones once, boolean ones never."""
    saved = module.state_dict().keys()
    buffers = {name: one for name, one in module.named_buffers() if name in saved}
    both = {**dict(module.named_parameters()), **buffers}
    return {name: one for name, one in both.items() if one.dtype != torch.bool}


def arrays_of(module: nn.Module, chosen: Filter = True) -> dict[str, Array]:
    """Return the tensors that a filter selects, as arrays; see ``as_array``."""
    tensors = tensors_of(module)
    return {name: as_array(one) for name, one in tensors.items() if selected(chosen, name)}


def untrained(module: nn.Module) -> set[str]:
    """Return the names of the parameters that need no gradient; no task sends them."""
    return {name for name, one in module.named_parameters() if not one.requires_grad}


def statistics(module: nn.Module) -> set[str]:
    """Return the names of the buffers, such as running means."""
    return tensors_of(module).keys() - {name for name, _ in module.named_parameters()}


def fill(module: nn.Module, arrays: Mapping[str, Array]) -> None:
    """Set the tensors that have one of these names, in place."""
    with torch.no_grad():
        for name, tensor in tensors_of(module).items():
            if name in arrays:
                if 0 in tensor.stride():  # expanded: its elements share their memory
                    tensor.data = tensor.clone(memory_format=torch.contiguous_format)
                tensor.copy_(as_tensor(arrays[name]))


def copy_of(module: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a copy of a module that shares some tensors, given by their ``id``.

    A module may have a tensor that its last call or a hook has computed, such as the ``weight`` of
    ``nn.utils.weight_norm``. PyTorch does not copy such a tensor, so the copy has its values. Nor
    does Python copy a function, such as a hook or ``self.body = lambda x: self.layer(x)``: that of
    the copy must not go on to call the layer of the original, which is not trained. Functions are
    found in lists, tuples, dicts, partials, methods and other functions, but in no other object;
    training refuses a module with such a function elsewhere.
    """
    memo = dict(shared or {})
    for part in module.modules():
        for one in vars(part).values():
            if isinstance(one, torch.Tensor) and not one.is_leaf:
                memo[id(one)] = one.detach().clone()
    made: nn.Module = copy.deepcopy(module, memo)
    for part in made.modules():
        for name, one in vars(part).items():
            vars(part)[name] = _rebound(one, memo)
    return made


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """Return a value with the functions in it bound to copies, which are given by ``id``.

    What has no copy and binds to none is returned as it is.
    """

    def moved(*parts: Any) -> list[Any] | None:
        after = [_rebound(one, copies) for one in parts]
        return None if all(map(operator.is_, parts, after)) else after

    if id(value) in copies:
        return copies[id(value)]
    copies[id(value)] = made = value  # it may contain itself
    if isinstance(value, CellType):
        if new := moved(_contents(value)):
            made = CellType(*new)
    elif isinstance(value, FunctionType):
        bound = value.__defaults__, value.__kwdefaults__, value.__closure__
        if new := moved(*bound):
            defaults, named, cells = new
            own = CellType()  # of a function that calls itself
            cells = cells and tuple(own if _contents(one) is value else one for one in cells)
            made = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
            own.cell_contents, made.__kwdefaults__ = made, named
            vars(made).update(vars(value))
    elif isinstance(value, MethodType):
        if new := moved(value.__func__, value.__self__):
            made = MethodType(*new)
    elif isinstance(value, functools.partial):
        if new := moved(value.func, value.args, value.keywords):
            made = functools.partial(new[0], *new[1], **new[2])
    elif type(value) in (list, tuple):
        made = type(value)(new) if (new := moved(*value)) else value
    elif type(value) in (dict, OrderedDict) and (new := moved(*value.values())):
        made = type(value)(zip(value, new, strict=True))
    copies[id(value)] = made
    return made


def _contents(cell: CellType) -> Any:
    with contextlib.suppress(ValueError):  # an empty cell
        return cell.cell_contents
    return None


def trained_by(plan: Plan, module: nn.Module) -> dict[str, Any]:
    """Return the parameters of a module that a plan trains; the others then need no gradient.

    Raises:
        TaskError: if there are none.
    """
    able: dict[str, Any] = {n: one for n, one in module.named_parameters() if one.requires_grad}
    params: dict[str, Any] = dict(select_tensors(able, plan.train))
    if not params:
        raise TaskError(
            f"the coordinator's --train selects the tensors {', '.join(plan.train or ())[:200]}, "
            "but this task's model trains none of these tensors; correct --train "
            f"{tensors_of_model(able)}"
        )
    for name in able.keys() - params.keys():
        able[name].requires_grad_(False)
    return params


def copies_of(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Return the tensors' values as arrays that share no memory with them."""
    return {name: as_array(one).copy() for name, one in tensors.items()}


def as_array(tensor: Any) -> Array:
    """Return a tensor's values; the array shares the memory of a tensor on the CPU."""
    tensor = tensor.detach().cpu()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype.startswith(("bfloat16", "float8")):  # unknown to NumPy
        bits = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.uint8).numpy()
        return np.asarray(bits).view(getattr(ml_dtypes, dtype))
    return np.asarray(tensor.numpy())


def as_tensor(array: Any) -> Any:
    """Return a tensor on the CPU that may share the array's memory."""
    # torch warns about arrays that it could write to, though they are read-only: copy those.
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
