"""Model files: a checkpoint as arrays or in a module, and a module as a model file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluffle_common.errors import UsageError
from fluffle_common.tensors.checkpoint import read_checkpoint, save_checkpoint
from fluffle_common.tensors.frozen import IN_METADATA, frozen_of, read_frozen, save_frozen
from fluffle_common.tensors.groups import STATISTICS
from fluffle_common.tensors.weights import same_form

if TYPE_CHECKING:
    from flax import nnx
    from torch import nn

    from fluffle_common.tensors.weights import Array, Weights


def load_model(file: str | os.PathLike[str]) -> dict[str, Array]:
    """Read a checkpoint, such as ``runs/letters/round-0006.safetensors``.

    Any other safetensors file works too. If the file has a digest of its tensors, it is checked.

    Args:
        file: the checkpoint.

    Returns:
        The model's arrays, by the names that the task gave them.

    Raises:
        UsageError: if there is no such file, or it is damaged.

    Example:
        >>> load_model("runs/absent/round-0001.safetensors")
        Traceback (most recent call last):
            ...
        fluffle_common.errors.UsageError: there is no model file runs/absent/round-0001.safetensors
    """
    weights, _ = read_checkpoint(Path(file))
    return weights


def load_into(
    module: nn.Module | nnx.Module,
    source: str | os.PathLike[str] | Weights,
    *,
    federated: Any = True,
) -> None:
    """Load a model into a module of Flax or PyTorch, by name.

    These are the tensors that travel by default: every ``nnx.Param`` and ``nnx.BatchStat``, or
    every parameter and persistent buffer. A checkpoint's frozen tensors, if it has some, are read
    from the file beside it.

    Args:
        module: the module to change in place; it has the structure of the trained module.
        source: a checkpoint, or arrays by name, such as ``fluffle.Run.weights``.
        federated: the filter of the task, which selects the tensors that the model has, such as
            ``nnx.LoRAParam`` for adapters; the others stay unchanged. Parameters of PyTorch with
            ``requires_grad=False`` stay unchanged too if the model has none of them.

    Raises:
        UsageError: if the file cannot be read, an argument is of another type, or the names, shapes
            or dtypes differ from the module's; the module is then unchanged.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> module = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> model = {"kernel": np.full((1, 1), 3, np.float32), "bias": np.ones(1, np.float32)}
        >>> load_into(module, model)
        >>> module(np.full((1, 1), 2, np.float32)).tolist()
        [[7.0]]
    """
    tensors = _framework_of(module)
    weights: Weights
    frozen: Weights = {}
    if isinstance(source, Mapping):
        weights = {name: _as_array(one) for name, one in source.items()}
    elif isinstance(source, str | os.PathLike):
        weights, metadata = read_checkpoint(Path(source))
        frozen = read_frozen(Path(source).parent, metadata.get(IN_METADATA, "")).tensors
    else:
        raise UsageError(
            f"{source!r:.60} is not a model; expected the path of a model file, or a mapping of "
            "names to arrays (for example run.weights)"
        )
    weights, every = {**weights, **frozen}, tensors.arrays_of(module)
    current = tensors.arrays_of(module, federated)
    current |= {name: array for name, array in every.items() if name in frozen}
    untrained = tensors.untrained(module)
    if not untrained & weights.keys():  # as in the checkpoints of a task that freezes them
        current = {name: array for name, array in current.items() if name not in untrained}
    try:
        same_form(current, weights)
    except ValueError as why:
        what = "the model" if isinstance(source, Mapping) else os.fspath(source)
        raise UsageError(f"the module {type(module).__name__} does not fit {what}: {why}") from None
    tensors.fill(module, weights)


def save_model(
    file: str | os.PathLike[str],
    module: nn.Module | nnx.Module,
    *,
    federated: Any = True,
    frozen: Any = False,
) -> None:
    """Write a module of Flax or PyTorch as a model file, such as ``fluffle coordinator --init``.

    Args:
        file: the safetensors file to write.
        module: the module; the tensors that travel by default are written (see ``load_into``),
            without parameters of PyTorch with ``requires_grad=False``, which no task sends.
        federated: the filter of the tensors that travel, the same as the task's.
        frozen: the filter of the frozen tensors, the same as that of a task with
            ``share_frozen=True``. They go to a file of their own beside ``file``, whose name is
            made from their content.

    Raises:
        OSError: if a file cannot be written.
        UsageError: if it is no module, or a filter selects none of its tensors.
        ValueError: if a tensor has a dtype that does not travel.
    """
    tensors = _framework_of(module)
    arrays_of = tensors.arrays_of
    path, kept = Path(file), frozen_of(arrays_of(module, frozen))
    if frozen is not False and not kept.tensors:
        raise UsageError(
            f"frozen= selects no tensor of the module {type(module).__name__}; correct the filter"
        )
    if kept.digest:
        save_frozen(path.parent, kept)
    elsewhere = kept.tensors.keys() | tensors.untrained(module)
    arrays = arrays_of(module, federated)
    model = {name: array for name, array in arrays.items() if name not in elsewhere}
    if not model:
        raise UsageError(
            f"with these federated= and frozen= filters, the module {type(module).__name__} has no "
            "tensor left to save; correct the filters"
        )
    metadata = {IN_METADATA: kept.digest} if kept.digest else {}
    metadata[STATISTICS] = json.dumps(sorted(tensors.statistics(module) & model.keys()))
    save_checkpoint(path, model, metadata)


def _as_array(value: Any) -> Array:
    """Return a tensor of any framework, or a list, as a NumPy array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        from fluffle_worker.tasks.torch_tensors import as_array

        return as_array(value)
    return np.asarray(value)


def _framework_of(module: Any) -> Any:
    """Return the functions ``arrays_of``, ``fill``, ``statistics`` and ``untrained``."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(module, torch.nn.Module):
        from fluffle_worker.tasks import torch_tensors

        return torch_tensors
    from flax import nnx

    from fluffle_worker.tasks import model_parts

    if not isinstance(module, nnx.Module):
        raise UsageError(
            f"{module!r:.60} is not a module; expected a module of Flax or PyTorch, such as "
            "Model(rngs=rngs)"
        )
    return model_parts
