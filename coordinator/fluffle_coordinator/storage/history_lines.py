"""The form of the history's lines: the fields that its readers use, and their types.

A line may have more fields: metrics under any name, and the fields of later versions.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, InstanceOf, ValidationError

from fluffle_common.protocol.messages.base import Model
from fluffle_common.protocol.messages.fields import Metric, NumExamples, Round, Sequence

_Text = InstanceOf[str]  # a file name in it may not be valid Unicode, which pydantic's str refuses
_Count = Annotated[int, Field(ge=0)]
_Metrics = dict[_Text, Metric | None]  # None stands for a value that is not finite


class _Participant(Model):
    worker: _Text
    num_examples: NumExamples
    sequence: Sequence
    train_loss: Metric | None = None
    seconds: Metric | None = None
    counted_s: Metric | None = None
    bytes: _Count | None = None
    norm: Metric | None = None
    staleness: _Count = 0
    discount: Annotated[Metric, Field(gt=0, le=1)] = 1.0
    weight: Metric | None = None
    metrics: _Metrics = Field(default_factory=dict)


class _Late(Model):
    worker: _Text | None = None
    round: Round | None = None


class _Line(Model):
    event: _Text
    round: Round
    late: _Count = 0
    rejected: _Count = 0
    late_updates: list[_Late] = Field(default_factory=list)
    rejections: list[dict[_Text, Any]] = Field(default_factory=list)


class _Committed(_Line):
    round: Annotated[Round, Field(ge=1)]
    run: _Text
    base: _Text
    asked: list[_Text] = Field(default_factory=list)
    participants: list[_Participant]
    opened_at: _Text = ""
    committed_at: _Text = ""
    checkpoint: _Text = ""
    strategy: _Text = ""
    epsilon: Metric | None = None
    delta: Metric | None = None
    timings: dict[_Text, Metric] = Field(default_factory=dict)


class _Evaluation(Model):
    worker: _Text
    num_examples: _Count
    loss: Metric | None
    metrics: _Metrics = Field(default_factory=dict)


class _Evaluated(_Line):
    loss: Metric | None
    num_examples: _Count = 0
    evaluators: list[_Text] = Field(default_factory=list)
    evaluations: list[_Evaluation] = Field(default_factory=list)


class _Ended(_Line):
    outcome: _Text = ""
    reason: _Text = ""


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
