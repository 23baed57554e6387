"""The entries of a tensor table, and its limits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, Strict

_Key = TypeVar("_Key", bound=tuple[Any, ...])
_Result = TypeVar("_Result")

MAX_TENSORS = 100_000
MAX_TENSOR_NAME, MAX_DIMENSIONS = 500, 32
# Limits of the caches of tables, which bound what peers can make a process remember.
_CACHED_TABLES, _MAX_CACHED_TENSORS = 8, 5_000

MODEL = "model"
"""The group of the model's tensors, or of a delta."""
GROUP_PATTERN = r"^[a-z][a-z0-9_-]{0,31}$"
ENCODING_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"
Encoding = Annotated[str, Field(pattern=ENCODING_PATTERN)]


class TensorEntry(NamedTuple):
    """A tensor in the payload: little-endian, in C order, at an ``offset`` divisible by 64.

    ``group`` is its purpose; on the wire, the key is left out for ``model``.
    """

    name: Annotated[str, Field(min_length=1, max_length=MAX_TENSOR_NAME)]
    dtype: Annotated[str, Field(max_length=16)]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(max_length=MAX_DIMENSIONS)
    ]
    offset: Annotated[int, Field(ge=0)]
    nbytes: Annotated[int, Field(ge=0)]
    group: Annotated[str, Field(pattern=GROUP_PATTERN)] = MODEL


def cached(function: Callable[[_Key], _Result]) -> Callable[[_Key], _Result]:
    """Cache the results of a function of a table, or of another tuple with an item per tensor."""
    cached_function = functools.lru_cache(_CACHED_TABLES)(function)

    @functools.wraps(function)
    def call(key: _Key) -> _Result:
        return (cached_function if len(key) <= _MAX_CACHED_TENSORS else function)(key)

    return call
