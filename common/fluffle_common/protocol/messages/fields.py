"""The types of message fields, with their bounds and patterns."""

from __future__ import annotations

from collections.abc import Sized
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict
from pydantic_core import PydanticKnownError

from fluffle_common.tensors.table import MAX_DIMENSIONS, MAX_TENSOR_NAME, MAX_TENSORS

MAX_NUM_EXAMPLES = 10**12
MAX_METRICS = MAX_METRIC_NAME = MAX_ID = 64
MAX_CLASS_NAME = 100
# Every heartbeat carries these, and the coordinator stores them for each worker.
MAX_TASK_CHARACTERS = 200
MAX_CLASSES, MAX_CLASSES_BYTES = 5_000, 32 * 2**10

# Part of queue names and routing keys. A federation's name has no dot, so that its queues cannot be
# mistaken for those of another federation.
FEDERATION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
WORKER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


def limited(most: int) -> BeforeValidator:
    """Limit the items of a mapping before they are validated.

    pydantic describes every invalid item: 60 kB of them would take it a second.
    """

    def check(value: Any) -> Any:
        if isinstance(value, Sized) and len(value) > most:
            about = {"field_type": "Dictionary", "max_length": most, "actual_length": len(value)}
            raise PydanticKnownError("too_long", about)
        return value

    return BeforeValidator(check)


Federation = Annotated[str, Field(pattern=FEDERATION_PATTERN)]
WorkerId = Annotated[str, Field(pattern=WORKER_PATTERN)]
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Round = Annotated[int, Field(ge=0, le=10**9)]
Sequence = Annotated[int, Field(ge=1, le=10**15)]
NumExamples = Annotated[int, Field(ge=1, le=MAX_NUM_EXAMPLES)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Metric = Annotated[float, Field(allow_inf_nan=False)]
_MetricName = Annotated[str, Field(min_length=1, max_length=MAX_METRIC_NAME, pattern=r"\S")]
Metrics = Annotated[dict[_MetricName, Metric], Field(max_length=MAX_METRICS), limited(MAX_METRICS)]
Text = Annotated[str, Field(max_length=2000)]
TaskName = Annotated[str, Field(max_length=MAX_TASK_CHARACTERS)]


KeyId = Annotated[str, Field(min_length=1, max_length=64)]
Signature = Annotated[str, Field(min_length=1, max_length=2000)]
Scheme = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,31}$")]
_TensorName = Annotated[str, Field(min_length=1, max_length=MAX_TENSOR_NAME)]
Extra = (
    Literal["model"]
    | Annotated[
        dict[
            _TensorName,
            Annotated[
                tuple[Annotated[int, Field(ge=0)], ...],
                Strict(False),
                Field(max_length=MAX_DIMENSIONS, fail_fast=True),
            ],
        ],
        Field(min_length=1, max_length=1000),
        limited(1000),
    ]
)
TensorNames = Annotated[
    tuple[_TensorName, ...],
    Strict(False),
    Field(max_length=MAX_TENSORS, fail_fast=True),
]
Train = Annotated[
    tuple[_TensorName, ...],
    Strict(False),
    Field(min_length=1, max_length=1000, fail_fast=True),
]
Value = bool | int | float | Text
Config = Annotated[
    dict[Annotated[str, Field(max_length=100)], Value], Field(max_length=100), limited(100)
]
Critical = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=64)], ...],
    Strict(False),
    Field(max_length=32, fail_fast=True),
]


def _check_size(classes: tuple[str, ...]) -> tuple[str, ...]:
    size_bytes = sum(len(name.encode()) for name in classes)
    if size_bytes > MAX_CLASSES_BYTES:
        raise ValueError(
            f"the names of {len(classes)} classes have {size_bytes} bytes in total; the limit is "
            f"{MAX_CLASSES_BYTES}"
        )
    return classes


Classes = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=MAX_CLASS_NAME)], ...],
    Strict(False),
    Field(max_length=MAX_CLASSES, fail_fast=True),
    AfterValidator(_check_size),
]
