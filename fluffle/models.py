"""Model files: a checkpoint as arrays or in a Flax module, and a Flax module as a model file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluffle_common.errors import UsageError
from fluffle_common.tensors.checkpoint import read_checkpoint, save_checkpoint
from fluffle_common.tensors.frozen import IN_METADATA, frozen_of, read_frozen, save_frozen

_SHOWN = 5  # names of a difference that are listed

if TYPE_CHECKING:
    from flax import nnx

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
    module: nnx.Module, source: str | os.PathLike[str] | Weights, *, federated: Any = True
) -> None:
    """Load a model into a Flax module: every ``nnx.Param`` and ``nnx.BatchStat``, by name.

    A checkpoint's frozen tensors, if it has some, are read from the file beside it.

    Args:
        module: the module to change in place; it has the structure of the trained module.
        source: a checkpoint, or arrays by name, such as ``fluffle.Run.weights``.
        federated: a Flax filter that selects the tensors that the model has, such as
            ``nnx.LoRAParam`` for adapters; the others stay unchanged.

    Raises:
        UsageError: if the file cannot be read, or its names, shapes or dtypes differ from the
            module's; the module is then unchanged.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> module = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> model = {"kernel": np.full((1, 1), 3, np.float32), "bias": np.ones(1, np.float32)}
        >>> load_into(module, model)
        >>> module(np.full((1, 1), 2, np.float32)).tolist()
        [[7.0]]
    """
    import jax.numpy as jnp
    from flax import nnx

    from fluffle_worker.local.optax import tensor_name
    from fluffle_worker.tasks.model_parts import AVERAGED

    weights, frozen = (source, {}) if isinstance(source, Mapping) else _with_frozen(Path(source))
    weights = {**weights, **frozen}

    def is_frozen(path: Any, _: Any) -> bool:
        return tensor_name(path) in frozen

    filled = nnx.All(AVERAGED, nnx.Any(federated, is_frozen))
    state = nnx.to_flat_state(nnx.state(module, filled))
    current = {tensor_name(path): leaf.get_value() for path, leaf in state}
    differences = _differences(weights, current)
    if differences:
        what = "the model" if isinstance(source, Mapping) else os.fspath(source)
        raise UsageError(f"{what} does not fit {type(module).__name__}: {'; '.join(differences)}")
    loaded = [(path, leaf.replace(jnp.asarray(weights[tensor_name(path)]))) for path, leaf in state]
    nnx.update(module, nnx.from_flat_state(loaded))


def save_model(
    file: str | os.PathLike[str], module: nnx.Module, *, federated: Any = True, frozen: Any = False
) -> None:
    """Write a Flax module as a model file, such as one for ``fluffle coordinator --init``.

    Args:
        file: the safetensors file to write.
        module: the module; every ``nnx.Param`` and every ``nnx.BatchStat`` is written.
        federated: a Flax filter of the tensors that travel, the same as the task's.
        frozen: a Flax filter of the frozen tensors, the same as that of a task with
            ``share_frozen=True``. They go to a file of their own beside ``file``, whose name is
            made from their content.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if a tensor has a dtype that does not travel.
    """
    from flax import nnx

    from fluffle_worker.local.optax import named
    from fluffle_worker.tasks.model_parts import AVERAGED

    def arrays(chosen: Any) -> dict[str, Array]:
        state = nnx.state(module, nnx.All(AVERAGED, chosen))
        return {name: np.asarray(array) for name, array in named(state).items()}

    path, kept = Path(file), frozen_of(arrays(frozen))
    if kept.digest:
        save_frozen(path.parent, kept)
    told = {IN_METADATA: kept.digest} if kept.digest else {}
    save_checkpoint(path, arrays(nnx.All(nnx.Not(frozen), federated)), told)


def _with_frozen(file: Path) -> tuple[Weights, Weights]:
    """Read the model in a checkpoint, and the frozen tensors that belong to it."""
    weights, metadata = read_checkpoint(file)
    try:
        return weights, read_frozen(file.parent, metadata.get(IN_METADATA, "")).tensors
    except UsageError as why:
        raise UsageError(f"the frozen tensors that belong to {file} are missing: {why}") from None


def _differences(weights: Weights, current: Mapping[str, Any]) -> list[str]:
    """Return the differences between a model and a module, as phrases for an error."""
    differences = []
    for names, what in (
        (current.keys() - weights.keys(), "the file lacks"),
        (weights.keys() - current.keys(), "the module lacks"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            differences.append(f"{what} {', '.join(sorted(names)[:_SHOWN])}{more}")
    for name in sorted(current.keys() & weights.keys()):
        new, old = weights[name], current[name]
        if (new.shape, new.dtype) != (old.shape, old.dtype) and len(differences) < _SHOWN:
            differences.append(f"{name} is {_form(new)} in the file, {_form(old)} in the module")
    return differences


def _form(tensor: Any) -> str:
    return f"{tensor.dtype.name}{list(tensor.shape)}"
