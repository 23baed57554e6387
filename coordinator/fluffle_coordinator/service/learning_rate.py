"""Learning rate schedules: the workers' learning rate as a function of the round."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass

from fluffle_common.errors import UsageError


@dataclass(frozen=True)
class LearningRateSchedule:
    """A multiplier of the learning rate for each round.

    ``cosine`` anneals to almost 0 in the last round (Loshchilov and Hutter, ICLR 2017,
    without restarts), ``exponential`` multiplies by a factor after each round, ``step`` after every
    ``rounds`` rounds. The coordinator evaluates the schedule: the plan of a round carries the rate.

    >>> schedule = LearningRateSchedule.parse("step:2,0.5")
    >>> [schedule.at(number, rounds=5, base=0.8) for number in (1, 2, 3, 4, 5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    kind: str = "constant"
    factor: float = 1.0  # of ``exponential`` and ``step``; above 0 and at most 1
    rounds: int = 1  # of a ``step``

    @classmethod
    def parse(cls, text: str) -> LearningRateSchedule:
        """Parse ``constant``, ``cosine``, ``exponential:FACTOR`` or ``step:ROUNDS,FACTOR``.

        Raises:
            UsageError: if it has none of these forms.
        """
        kind, _, rest = text.partition(":")
        schedule = None
        with contextlib.suppress(ValueError):
            match kind, rest.split(",") if rest else []:
                case "constant" | "cosine", []:
                    schedule = cls(kind)
                case "exponential", [factor]:
                    schedule = cls(kind, float(factor))
                case "step", [rounds, factor]:
                    schedule = cls(kind, float(factor), int(rounds))
        if schedule is None or not (0 < schedule.factor <= 1 and 1 <= schedule.rounds < 2**31):
            raise UsageError(
                f"invalid value '{text}' of --learning-rate-schedule; expected constant, cosine, "
                "exponential:FACTOR or step:ROUNDS,FACTOR, with a FACTOR above 0 and at most 1"
            )
        return schedule

    def __str__(self) -> str:
        """Return the text that ``parse`` reads."""
        settings = {"exponential": f":{self.factor}", "step": f":{self.rounds},{self.factor}"}
        return self.kind + settings.get(self.kind, "")

    def at(self, number: int, rounds: int, base: float) -> float:
        """Return the rate of a round in a run of so many; ``base`` is that of the first round."""
        done = number - 1
        if self.kind == "cosine":
            multiplier = (1 + math.cos(math.pi * min(done, rounds - 1) / rounds)) / 2
        else:  # the steps of "constant" and "exponential" have one round
            multiplier = self.factor ** (done // self.rounds)
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
        raise UsageError(
            f"--learning-rate-schedule {text} needs the learning rate of the first round; add "
            "--learning-rate"
        )
    return schedule
