"""What a task's model is made of: known when it is loaded, and compared before it is trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from fluffle_common.console import warn
from fluffle_common.errors import TaskError
from fluffle_common.layout import DTYPES, Form, form_of
from fluffle_common.messages import MAX_DIMENSIONS, MAX_TENSOR_NAME, MAX_TENSORS, ModelForm
from fluffle_worker.results import arrays
from fluffle_worker.task import Task
from fluffle_worker.user_code import full_trace, one_line

UNKNOWN: Form = ()
"""The form of a task that cannot say it; no model is without tensors."""
_DIFFERS = "the federation's model differs from this task's"


def form_of_task(task: Task) -> Form:
    """Return what a task's model is made of, checked; ``UNKNOWN`` where its ``init`` fails.

    A task that has a method ``model_form`` is asked for it; of any other, first weights are made
    and thrown away.

    Raises:
        TaskError: for what cannot travel, with the tensor, what is wrong with it, and the remedy.
    """
    try:
        ask = getattr(task, "model_form", None)
        form = _form(ask()) if callable(ask) else form_of(arrays(task.init(0), "init()"))
    except TaskError:
        raise
    except (Exception, SystemExit) as why:
        warn(
            f"the task's init() fails, so this worker can make no first weights: {one_line(why)}\n"
            f"{full_trace(why)}"
        )
        return UNKNOWN
    check_form(form)
    return form


def check_form(form: Form) -> None:
    """Check that tensors of these names, dtypes and shapes can travel.

    Raises:
        TaskError: naming the first that cannot, what is wrong with it, and the remedy.
    """
    if not 1 <= len(form) <= MAX_TENSORS:
        raise TaskError(f"the model has {len(form)} tensors; from 1 to {MAX_TENSORS} are expected")
    for name, dtype, shape in form:
        if not isinstance(name, str) or not name:
            raise TaskError(f"a tensor of the model is called {name!r}; its name must be text")
        if len(name) > MAX_TENSOR_NAME:
            raise TaskError(
                f"the name of tensor '{name[:60]}…' has {len(name)} characters, at most "
                f"{MAX_TENSOR_NAME} travel; give it a shorter one"
            )
        if not name.isprintable() and "\ud800" <= max(name) <= "\udfff":
            raise TaskError(f"the name of tensor {name!a} is not valid text; give it another")
        if dtype.name not in DTYPES:
            raise TaskError(f"tensor '{name}' is {dtype.name}, which does not travel; {_do(dtype)}")
        if len(shape) > MAX_DIMENSIONS:
            raise TaskError(
                f"tensor '{name}' has {len(shape)} dimensions, at most {MAX_DIMENSIONS} travel; "
                "reshape it in the task"
            )


def described(form: Form) -> ModelForm | None:
    """Return a form in short; None where it is not known."""
    if form == UNKNOWN:
        return None
    entries = sorted([name, dtype.name, list(shape)] for name, dtype, shape in form)
    packed = json.dumps(entries, separators=(",", ":"))
    size = sum(math.prod(shape) for _, _, shape in form)
    dtypes = Counter(dtype.name for _, dtype, _ in form)
    told = ", ".join(f"{name} {number}" for name, number in dtypes.most_common())
    return ModelForm(
        digest=hashlib.sha256(packed.encode()).hexdigest()[:16],
        summary=f"{len(form)} tensors, {size:,} parameters: {told}"[:300],
    )


def difference(federation: Form, own: Form) -> str | None:
    """Say in what the federation's model and a task's own differ first; None where they do not."""
    if own in (UNKNOWN, federation):
        return None
    theirs, ours = _by_name(federation), _by_name(own)
    if theirs == ours:
        return None
    for names, what in (
        (theirs.keys() - ours.keys(), "is not in this task's model"),
        (ours.keys() - theirs.keys(), "is in this task's model only"),
    ):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{_DIFFERS}: tensor '{min(names)}'{more} {what}"
    differ = [name for name in theirs if theirs[name] != ours[name]]
    (dtype, shape), (own_dtype, own_shape) = theirs[differ[0]], ours[differ[0]]
    told = (
        f"{_DIFFERS}: tensor '{differ[0]}' is {dtype.name} of shape {shape} there, "
        f"{own_dtype.name} of shape {own_shape} here"
    )
    if all(
        theirs[name][1] == ours[name][1]
        and {theirs[name][0].name, ours[name][0].name} == {"float32", "float64"}
        for name in differ
    ):
        told += "; with JAX, set JAX_ENABLE_X64 for all workers or for none"
    return told


def _by_name(form: Form) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    return {name: (dtype.newbyteorder("="), shape) for name, dtype, shape in form}


def _form(given: Mapping[str, Any]) -> Form:
    return tuple([(n, np.dtype(one.dtype), tuple(one.shape)) for n, one in given.items()])


def _do(dtype: np.dtype[Any]) -> str:
    """Return the remedy for a dtype that does not travel."""
    if dtype.kind == "b":
        return "keep it out of the weights, or make it uint8 in init() and train()"
    if dtype.kind == "c":
        return "make two tensors of it, the real and the imaginary part"
    if dtype.kind in "OSUMm" or dtype.names:
        return "keep it out of the weights, which are numbers"
    if dtype.kind == "f":
        return "make it float64 in init() and train()"
    if "int" in dtype.name:
        return "make it int8 in init() and train()"
    return f"make it {'bfloat16' if 'bfloat16' in DTYPES else 'float32'} in init() and train()"
