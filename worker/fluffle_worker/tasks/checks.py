"""Checks of what users pass to the adapters, so that errors name it before a training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from fluffle_common.cli.user_values import number, shown
from fluffle_common.errors import TaskError
from fluffle_common.tensors.groups import tensors_of_model

_NUMBERS = "biufcV"  # kinds of dtypes; V has those of ml_dtypes, such as bfloat16


def check_pair(data: Any, what: str) -> None:
    """Check that data are a pair.

    Raises:
        TaskError: if they are not; ``what`` names them.
    """
    given = type(data).__name__
    if not isinstance(data, tuple | list):
        raise TaskError(f"{what} is of type {given}; expected a pair (inputs, targets)")
    if len(data) != 2:
        raise TaskError(
            f"{what} is a {given} with {len(data)} entries; expected a pair (inputs, targets)"
        )


def checked_array(value: Any, what: str) -> Any:
    """Return one entry of users' data, an array or tensor of any framework, or a NumPy array of it.

    Raises:
        TaskError: if it is not an array of numbers with a first axis; ``what`` names the data.
    """
    check_unmasked(value, what)
    if hasattr(value, "to_numpy"):  # such as a DataFrame or a Series of pandas or polars
        value = value.to_numpy()
    elif not hasattr(value, "dtype") and hasattr(value, "__array__"):
        value = np.asarray(value)
    if not getattr(value, "shape", ()):
        raise TaskError(
            f"{what} contains {shown(value)}; expected an array with one entry per example (to "
            "convert a list, use numpy.asarray)"
        )
    dtype = value.dtype
    if isinstance(dtype, np.dtype) and (dtype.kind not in _NUMBERS or dtype.names):
        raise TaskError(
            f"{what} contains an array of dtype {dtype}; convert this array to numbers, for "
            "example with astype('float32')"
        )
    if isinstance(dtype, np.dtype) and not dtype.isnative:  # JAX and torch refuse such arrays
        value = value.astype(dtype.newbyteorder("="))
    return value


def check_unmasked(value: Any, what: str) -> None:
    """Check that one entry of users' data has no mask, which a conversion would drop.

    Raises:
        TaskError: if it has one; ``what`` names the data.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TaskError(f"{what} contains a masked array; fill it, for example with filled(0)")


def as_rate(given: Any) -> float:
    """Return a learning rate.

    Raises:
        TaskError: if it is not a number above 0.
    """
    try:
        rate = number(given)
    except ValueError as wrong:
        raise TaskError(f"learning_rate= is {wrong}") from None
    if rate <= 0:
        raise TaskError(f"learning_rate= is {rate}; expected a number above 0")
    return rate


def check_function(option: str, given: Any, expected: str) -> None:
    """Check that an option is a function.

    Raises:
        TaskError: if it is not; ``expected`` says what it may be.
    """
    if not callable(given):
        raise TaskError(f"{option}= is {shown(given)}; expected {expected}")


def check_seed(given: Any) -> None:
    """Check a ``sample_seed``.

    Raises:
        TaskError: if it is not a whole number that NumPy and JAX take as a seed.
    """
    if not isinstance(given, Integral) or not 0 <= int(given) < 2**63:
        raise TaskError(
            f"sample_seed= is {shown(given)}; expected a whole number from 0 to 2**63 - 1"
        )


def as_metrics(given: Any) -> dict[str, Callable[..., Any]]:
    """Return an adapter's ``metrics``.

    Raises:
        TaskError: if they are not functions by name, or one has the name of the loss.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(map(callable, given.values())):
        raise TaskError(
            f"metrics= is {shown(given)}; expected a mapping of names to functions, such as "
            "{'accuracy': accuracy}"
        )
    if "loss" in given:
        raise TaskError(
            "metrics= contains the name 'loss', which is reserved for loss=; choose another name"
        )
    return dict(given)


def check_filters(names: Sequence[str], *, sends: bool, freezes: bool, trains: bool) -> None:
    """Check what the filters ``federated`` and ``frozen`` make of a model's tensors.

    Args:
        names: the names of the tensors.
        sends: whether they leave a tensor to send.
        freezes: whether ``frozen`` selects a tensor, or is not given.
        trains: whether they leave a parameter to train.

    Raises:
        TaskError: if one of these is false.
    """
    of_model = tensors_of_model(names)
    if not sends:
        raise TaskError(
            "with these federated= and frozen= filters, the model has no tensor left to send; "
            f"change the filters {of_model}"
        )
    if not freezes:
        raise TaskError(f"frozen= selects no tensor; change the filter {of_model}")
    if not trains:
        raise TaskError(
            "with this frozen= filter, the model has no parameter left to train; change the filter "
            f"{of_model}"
        )
