"""Model files: the checkpoints of a run, as arrays and in a Flax module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluffle_common.errors import UsageError
from fluffle_common.tensors.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from flax import nnx

    from fluffle_common.tensors.weights import Array, Weights


def load_model(file: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the model in a checkpoint, such as ``runs/letters/round-0006.safetensors``.

    Any other safetensors file will do, too. One that carries a digest of itself is checked by it.

    Args:
        file: the checkpoint.

    Returns:
        The model's arrays by name, as the task named them.

    Raises:
        UsageError: where there is no such file, or it is damaged.

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
    """Fill a Flax module with a model: every ``nnx.Param`` and every ``nnx.BatchStat``, by name.

    Args:
        module: changed in place; of the same form as the module that was trained.
        source: a checkpoint, or arrays by name, such as ``fluffle.Run.weights``.
        federated: a Flax filter of the tensors that the model has, such as ``nnx.LoRAParam`` for
            adapters; the others stay as they are.

    Raises:
        UsageError: where the file cannot be read, or its names, shapes or dtypes are not the
            module's; the module is then as it was.

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

    weights = source if isinstance(source, Mapping) else load_model(source)
    form = nnx.to_flat_state(nnx.state(module, nnx.All(AVERAGED, federated)))
    like = {tensor_name(path): leaf.get_value() for path, leaf in form}
    differences = _differences(weights, like)
    if differences:
        what = "the model" if isinstance(source, Mapping) else os.fspath(source)
        raise UsageError(f"{what} does not fit {type(module).__name__}: {'; '.join(differences)}")
    filled = [(path, leaf.replace(jnp.asarray(weights[tensor_name(path)]))) for path, leaf in form]
    nnx.update(module, nnx.from_flat_state(filled))


_SHOWN = 5


def _differences(weights: Weights, like: Mapping[str, Any]) -> list[str]:
    """Say in what a model and a module differ; nothing where they do not."""
    found = []
    for names, what in (
        (like.keys() - weights.keys(), "the file lacks"),
        (weights.keys() - like.keys(), "the module lacks"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            found.append(f"{what} {', '.join(sorted(names)[:_SHOWN])}{more}")
    for name in sorted(like.keys() & weights.keys()):
        there, here = weights[name], like[name]
        if (there.shape, there.dtype) != (here.shape, here.dtype) and len(found) < _SHOWN:
            found.append(f"{name} is {_form(there)} in the file, {_form(here)} in the module")
    return found


def _form(tensor: Any) -> str:
    return f"{tensor.dtype.name}{list(tensor.shape)}"
