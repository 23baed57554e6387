"""The signature of a task's model, and its comparison with the federation's.

A signature lists the name, dtype and shape of each tensor. It is read when the task is
loaded.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from fluffle_common.cli.console import warn
from fluffle_common.cli.user_code import warn_in_full
from fluffle_common.errors import TaskError
from fluffle_common.tensors.checkpoint import check_names
from fluffle_common.tensors.groups import check_statistics
from fluffle_common.tensors.layout import Signature, layout_of_signature, signature_of
from fluffle_common.user_errors import is_ctrl_c, one_line
from fluffle_worker.results import arrays
from fluffle_worker.task import Task, statistics_of

UNKNOWN: Signature = ()
"""The signature of a task whose ``init`` fails; no model has an empty one."""
_DIFFERS = "the federation's model differs from this task's model"


def signature_of_task(task: Task) -> Signature:
    """Return the checked signature of a task's model; ``UNKNOWN`` if its ``init`` fails.

    It comes from the task's method ``model_form`` if there is one, else from ``init(0)``.

    Raises:
        TaskError: if a tensor cannot travel; it names the tensor, the problem and the remedy.
    """
    ask = getattr(task, "model_form", None)
    try:
        if callable(ask):
            signature = tuple(
                (name, np.dtype(like.dtype), tuple(map(operator.index, like.shape)))
                for name, like in ask().items()
            )
        else:
            signature = signature_of(arrays(task.init(0), "init()"))
    except TaskError:
        raise
    except BaseException as why:
        if is_ctrl_c(why):
            raise
        fails = "init() fails, so this worker cannot make the first weights"
        if callable(ask):
            fails = "model_form() fails, so nobody can check that the federation has the same model"
        warn(f"the task's {fails}: {one_line(why)}")
        warn_in_full(why, "task")
        return UNKNOWN
    check_signature(signature)
    try:
        check_statistics(statistics_of(task), [name for name, _, _ in signature])
    except ValueError as wrong:
        raise TaskError(f"{wrong}; correct the task's attribute statistics") from None
    return signature


def check_signature(signature: Signature) -> None:
    """Check that tensors with these names, dtypes and shapes can travel.

    Raises:
        TaskError: if one cannot; it names the tensor, the problem and the remedy.
    """
    if not signature:
        raise TaskError("the task's model has no tensors; expected at least one tensor")
    try:
        layout_of_signature(signature)
        check_names(name for name, _, _ in signature)
    except ValueError as wrong:
        raise TaskError(str(wrong)) from None


def difference(federation: Signature, own: Signature) -> str | None:
    """Describe the first difference between two signatures; None if equal or ``own`` is unknown."""
    if own in (UNKNOWN, federation):
        return None
    theirs, ours = _by_name(federation), _by_name(own)
    if theirs == ours:
        return None
    for names, where in (
        (theirs.keys() - ours.keys(), "not in this task's model"),
        (ours.keys() - theirs.keys(), "only in this task's model"),
    ):
        if names:
            are = f"and {len(names) - 1} more are" if len(names) > 1 else "is"
            return f"{_DIFFERS}: tensor '{min(names):.100}' {are} {where}"
    differ = [name for name in theirs if theirs[name] != ours[name]]
    (dtype, shape), (own_dtype, own_shape) = theirs[differ[0]], ours[differ[0]]
    message = (
        f"{_DIFFERS}: tensor '{differ[0]:.100}' is {dtype.name} of shape {shape} in the "
        f"federation, but {own_dtype.name} of shape {own_shape} in this task"
    )
    if all(
        theirs[name][1] == ours[name][1]
        and {theirs[name][0].name, ours[name][0].name} == {"float32", "float64"}
        for name in differ
    ):
        message += "; with JAX, set JAX_ENABLE_X64 for all workers or for no worker"
    return message


def _by_name(signature: Signature) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    return {name: (dtype.newbyteorder("="), shape) for name, dtype, shape in signature}
