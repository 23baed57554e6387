"""Learning rate schedules."""

from __future__ import annotations

import pytest

from fluffle_common.errors import UsageError
from fluffle_common.protocol.messages import Plan
from fluffle_coordinator.service.learning_rate import CONSTANT, LearningRateSchedule, schedule_of


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8]),
        ("cosine", [0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5)]),
        ("exponential:0.5", [0.8, 0.4, 0.2, 0.1]),
        ("step:3,0.25", [0.8, 0.8, 0.8, 0.2]),
        ("exponential:0.12345678", [0.8, 0.098765424, 0.01219325, 0.00150534]),
    ],
)
def test_a_rate_follows_its_schedule(text, rates):
    schedule = LearningRateSchedule.parse(text)
    assert str(schedule) == text
    assert [schedule.at(number, 4, 0.8) for number in (1, 2, 3, 4)] == pytest.approx(rates)


@pytest.mark.parametrize("text", ["cosine", "exponential:0.1", "step:1,0.001"])
def test_a_plan_can_carry_the_rate_of_any_round(text):
    schedule = LearningRateSchedule.parse(text)
    for number in (1, 999, 10_000, 2**31):
        Plan(learning_rate=schedule.at(number, 10_000, 1e-3))


@pytest.mark.parametrize(
    "text",
    [
        "cosin",
        "",
        "cosine:0.5",
        "exponential",
        "exponential:2",
        "exponential:nan",
        "step:0,0.5",
        "step:2",
        "step:x,0.5",
    ],
)
def test_an_invalid_schedule_is_refused_with_the_valid_forms(text):
    expected = f"'{text}' of --learning-rate-schedule; expected constant, .*:ROUNDS,FACTOR, with"
    with pytest.raises(UsageError, match=expected):
        LearningRateSchedule.parse(text)


def test_a_schedule_needs_a_learning_rate():
    assert schedule_of("constant", None) == CONSTANT
    assert schedule_of("cosine", 0.1).kind == "cosine"
    with pytest.raises(UsageError, match="cosine needs .* add --learning-rate"):
        schedule_of("cosine", None)
