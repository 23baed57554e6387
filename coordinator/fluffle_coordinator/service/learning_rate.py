"""Learning rate schedules: the workers' learning rate as a function of the round."""

from __future__ import annotations

import difflib
import math
import sys
from dataclasses import dataclass

from fluffle_common.errors import UsageError

FORMS = {
    "constant": "constant",
    "cosine": "cosine",
    "exponential": "exponential:FACTOR",
    "step": "step:ROUNDS,FACTOR",
}
_OPTION = "--learning-rate-schedule"


@dataclass(frozen=True)
class LearningRateSchedule:
    """A multiplier of the learning rate for each round.

    ``cosine`` anneals to almost 0 in the last round (Loshchilov and Hutter, ICLR 2017,
    without restarts), ``exponential`` multiplies by a factor after each round, ``step`` after every
    ``rounds`` rounds. The coordinator evaluates the schedule: the plan of a round carries the rate.

    Args:
        kind: a key of ``FORMS``.
        factor: above 0 and at most 1; for ``exponential`` and ``step``.
        rounds: the number of rounds of a step; for ``step``.

    >>> schedule = LearningRateSchedule.parse("step:2,0.5")
    >>> [schedule.at(number, rounds=5, base=0.8) for number in (1, 2, 3, 4, 5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    kind: str = "constant"
    factor: float = 1.0
    rounds: int = 1

    @classmethod
    def parse(cls, text: str) -> LearningRateSchedule:
        """Parse a schedule in one of the ``FORMS``.

        Raises:
            UsageError: if it has none of these forms.
        """
        kind, _, settings = text.partition(":")
        if kind not in FORMS:
            near = difflib.get_close_matches(kind, FORMS, n=1)
            hint = f"did you mean {FORMS[near[0]]}? " if near else ""
            raise UsageError(
                f"there is no schedule '{kind}' ({_OPTION}); {hint}known are "
                f"{', '.join(FORMS.values())}"
            )
        wrong = UsageError(
            f"{_OPTION} is '{text}'; expected is {FORMS[kind]}, with a FACTOR above 0 and at most 1"
        )
        names = FORMS[kind].partition(":")[2]
        parts = settings.split(",") if settings else []
        if len(parts) != len(names.split(",") if names else []):
            raise wrong
        try:
            factor = float(parts[-1]) if parts else 1.0
            rounds = int(parts[0]) if len(parts) == 2 else 1
        except ValueError:
            raise wrong from None
        if not 0 < factor <= 1 or not 1 <= rounds < 2**31:
            raise wrong
        return cls(kind, factor, rounds)

    def __str__(self) -> str:
        """Return the text that ``parse`` reads."""
        settings = {"exponential": f":{self.factor:g}", "step": f":{self.rounds},{self.factor:g}"}
        return self.kind + settings.get(self.kind, "")

    def at(self, number: int, rounds: int, base: float) -> float:
        """Return the learning rate of a round.

        Args:
            number: the round, from 1.
            rounds: the number of rounds of the run.
            base: the rate of the first round.
        """
        done = number - 1
        match self.kind:
            case "cosine":
                multiplier = (1 + math.cos(math.pi * min(done, rounds - 1) / rounds)) / 2
            case "exponential":
                multiplier = self.factor**done
            case "step":
                multiplier = self.factor ** (done // self.rounds)
            case _:
                multiplier = 1.0
        # A plan's rate must be above 0, even if the product underflows.
        return max(base * multiplier, sys.float_info.min)


CONSTANT = LearningRateSchedule()


def schedule_of(text: str, learning_rate: float | None) -> LearningRateSchedule:
    """Parse a schedule and check that it has a learning rate to multiply.

    Raises:
        UsageError: if ``text`` is not a schedule, or a schedule other than ``constant`` is given
            without ``--learning-rate``.
    """
    schedule = LearningRateSchedule.parse(text)
    if schedule != CONSTANT and learning_rate is None:
        raise UsageError(f"{_OPTION} {text} needs the rate of the first round; add --learning-rate")
    return schedule
