"""The form of the history's lines: the fields that its readers use, and their types.

A line may have more fields: metrics under any name, and the fields of later versions.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, Field, InstanceOf, ValidationError

from fluffle_common.protocol.messages.base import Model
from fluffle_common.protocol.messages.fields import Metric, NumExamples, Round, Sequence

_Text = InstanceOf[str]  # a file name in it may not be valid Unicode, which pydantic's str refuses
_Count = Annotated[int, Field(ge=0)]
_Time = Annotated[_Text, AfterValidator(lambda text: datetime.fromisoformat(text).timestamp())]
_Metrics = dict[_Text, Metric | None]  # None stands for a value that is not finite


class _Participant(Model):
    worker: _Text
    num_examples: NumExamples
    sequence: Sequence
    train_loss: Metric | None
    seconds: Metric | None
    counted_s: Metric
    bytes: _Count
    norm: Metric | None
    staleness: _Count = 0
    discount: Annotated[Metric, Field(gt=0, le=1)] = 1.0
    weight: Metric | None = None
    metrics: _Metrics = Field(default_factory=dict)


class _Late(Model):
    worker: _Text
    round: Round


class _Line(Model):
    event: _Text
    round: Round


class _Counting(_Line):
    late: _Count
    rejected: _Count
    late_updates: list[_Late]
    rejections: list[dict[_Text, Any]]


class _Committed(_Counting):
    round: Annotated[Round, Field(ge=1)]
    run: _Text
    base: _Text
    asked: list[_Text]
    participants: list[_Participant]
    opened_at: _Time
    committed_at: _Time
    checkpoint: _Text
    strategy: _Text
    epsilon: Metric | None = None
    delta: Metric | None = None
    timings: dict[_Text, Metric]


class _Evaluation(Model):
    worker: _Text
    num_examples: _Count
    loss: Metric | None
    metrics: _Metrics = Field(default_factory=dict)


class _Evaluated(_Line):
    loss: Metric | None
    num_examples: _Count
    evaluators: list[_Text]
    evaluations: list[_Evaluation]


class _Ended(_Counting):
    outcome: _Text
    reason: _Text


_FORMS: dict[str, type[_Line]] = {"committed": _Committed, "evaluated": _Evaluated, "ended": _Ended}


def check_line(line: Any) -> None:
    """Check the fields of a history line.

    Raises:
        ValueError: naming the first field that is invalid or missing.
    """
    event = line.get("event") if isinstance(line, dict) else None
    try:
        _FORMS.get(event if isinstance(event, str) else "", _Line).model_validate(line)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(".".join(map(str, first["loc"])) or "no object") from None
