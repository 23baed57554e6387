"""What is said of tensors beside their bytes: an entry each, and how many and how large at most."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field, Strict

MAX_TENSORS = 100_000
MAX_TENSOR_NAME, MAX_DIMENSIONS = 500, 32
# So many tables of tensors are remembered, of up to this length: anyone may send any table.
CACHED_TABLES, MAX_CACHED_TENSORS = 8, 5_000

MODEL = "model"
"""The group of tensors that are the model's, or a delta of it."""
GROUP_PATTERN = r"^[a-z][a-z0-9_-]{0,31}$"
ENCODING_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"
Encoding = Annotated[str, Field(pattern=ENCODING_PATTERN)]


class TensorEntry(NamedTuple):
    """Where one tensor lies in the payload: little-endian, C order, ``offset`` a multiple of 64.

    ``group`` says what it is for; on the wire, it is left out for a tensor of the model.
    """

    name: Annotated[str, Field(min_length=1, max_length=MAX_TENSOR_NAME)]
    dtype: Annotated[str, Field(max_length=16)]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(max_length=MAX_DIMENSIONS)
    ]
    offset: Annotated[int, Field(ge=0)]
    nbytes: Annotated[int, Field(ge=0)]
    group: Annotated[str, Field(pattern=GROUP_PATTERN)] = MODEL
