"""The local learning rate from round to round."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable
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
    """By what a learning rate is multiplied in each round.

    ``cosine`` falls to almost nothing in the last round (Loshchilov and Hutter, ICLR 2017, without
    restarts), ``exponential`` is multiplied by a factor after each round, ``step`` after every so
    many rounds. A worker is told the rate of its round, whatever the schedule.

    Args:
        kind: one of ``FORMS``.
        factor: above 0 and at most 1; for ``exponential`` and ``step``.
        rounds: how many rounds a step lasts; for ``step``.

    >>> schedule = LearningRateSchedule.parse("step:2,0.5")
    >>> [schedule.at(number, rounds=5, base=0.8) for number in (1, 2, 3, 4, 5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    kind: str = "constant"
    factor: float = 1.0
    rounds: int = 1

    @classmethod
    def parse(cls, text: str) -> LearningRateSchedule:
        """Read a schedule as the command line has it.

        Raises:
            UsageError: if it is none; naming what would be one.
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
        """Write it as ``parse`` reads it."""
        settings = {"exponential": f":{self.factor:g}", "step": f":{self.rounds},{self.factor:g}"}
        return self.kind + settings.get(self.kind, "")

    def at(self, number: int, rounds: int, base: float) -> float:
        """Return the learning rate of a round.

        Args:
            number: of the round, from 1.
            rounds: how many the run has.
            base: the rate of the first round.
        """
        gone = number - 1
        multiplier: dict[str, Callable[[], float]] = {
            "constant": lambda: 1.0,
            "cosine": lambda: (1 + math.cos(math.pi * min(gone, rounds - 1) / rounds)) / 2,
            "exponential": lambda: self.factor**gone,
            "step": lambda: self.factor ** (gone // self.rounds),
        }
        # However many rounds: a plan's rate is above 0.
        return max(base * multiplier[self.kind](), sys.float_info.min)


CONSTANT = LearningRateSchedule()


def schedule_of(text: str, learning_rate: float | None) -> LearningRateSchedule:
    """Read a schedule, for a rate that the coordinator decides.

    Raises:
        UsageError: if it is none, or if it needs a ``--learning-rate`` and there is none.
    """
    schedule = LearningRateSchedule.parse(text)
    if schedule != CONSTANT and learning_rate is None:
        raise UsageError(f"{_OPTION} {text} needs the rate of the first round; add --learning-rate")
    return schedule
