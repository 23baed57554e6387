"""What a task's model is made of: known when it is loaded, and compared before it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fluffle_common.cli.console import warn
from fluffle_common.errors import TaskError
from fluffle_common.protocol.messages import ModelForm
from fluffle_common.protocol.model_form import form_from
from fluffle_common.tensors.layout import Signature, layout_of_signature, signature_of
from fluffle_worker.results import arrays
from fluffle_worker.task import Task
from fluffle_worker.user_code import one_line, warn_in_full

UNKNOWN: Signature = ()
"""The form of a task that cannot say it; no model is without tensors."""
_DIFFERS = "the federation's model differs from this task's"


def signature_of_task(task: Task) -> Signature:
    """Return what a task's model is made of, checked; ``UNKNOWN`` where its ``init`` fails.

    A task that has a method ``model_form`` is asked for it; of any other, first weights are made
    and thrown away.

    Raises:
        TaskError: for what cannot travel, with the tensor, what is wrong with it, and the remedy.
    """
    try:
        ask = getattr(task, "model_form", None)
        form = _form(ask()) if callable(ask) else signature_of(arrays(task.init(0), "init()"))
    except TaskError:
        raise
    except (Exception, SystemExit) as why:
        warn(f"the task's init() fails, so this worker can make no first weights: {one_line(why)}")
        warn_in_full(why)
        return UNKNOWN
    check_signature(form)
    return form


def check_signature(form: Signature) -> None:
    """Check that tensors of these names, dtypes and shapes can travel.

    Raises:
        TaskError: naming the first that cannot, what is wrong with it, and the remedy.
    """
    if not form:
        raise TaskError("the model has no tensors")
    try:
        layout_of_signature(form)
    except ValueError as wrong:
        raise TaskError(str(wrong)) from None


def described(form: Signature, frozen: Signature = ()) -> ModelForm | None:
    """Return a form in short, with that of the frozen tensors; None where it is not known."""
    return None if form == UNKNOWN else form_from(form, frozen)


def difference(federation: Signature, own: Signature) -> str | None:
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


def _by_name(form: Signature) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    return {name: (dtype.newbyteorder("="), shape) for name, dtype, shape in form}


def _form(given: Mapping[str, Any]) -> Signature:
    return tuple([(n, np.dtype(one.dtype), tuple(one.shape)) for n, one in given.items()])
