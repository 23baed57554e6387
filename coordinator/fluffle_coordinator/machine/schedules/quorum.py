"""Synchronous rounds: a cohort is asked, and the round closes when a quorum has answered.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, algorithm 1; with a quorum in place of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Draw, by_chance, chosen_by
from fluffle_coordinator.machine.staleness import POLYNOMIAL, Discount
from fluffle_coordinator.machine.state import State


@dataclass(frozen=True)
class QuorumRounds(Schedule[State]):
    """Rounds that close at the quorum, after the grace that the others have.

    Args:
        max_staleness: of how many rounds before late updates count; they close no round.
        phi: what part of its weight such an update keeps.
    """

    max_staleness: int = 0
    phi: Discount = POLYNOMIAL

    def discount(self, staleness: int) -> float:
        """Return what part of its weight a late update keeps that is so many rounds old."""
        return self.phi(staleness)

    def needed(self, state: State) -> int:
        """Return the quorum of those asked that answered or still will; 0 if chance asks nobody."""
        rules, expected = state.rules, state.tally.expected
        if rules.secret is not None and not state.asked:
            return 0
        if rules.over_provision > 1:
            expected = min(expected, rules.waited_for(len(state.asked)))
        return max(rules.quorum.of(expected), rules.least)

    def cohort(self, state: State) -> tuple[str, ...]:
        """Draw the round's sample of the workers present."""
        rules = state.rules
        if rules.secret is not None:
            return _drawn(state, rules.secret, state.workers)
        size, draw = rules.ask(len(state.workers)), Draw(rules.seed, state.round)
        return chosen_by(rules.selection, state.candidates(state.workers), size, draw)

    def again(self, state: State) -> tuple[str, ...]:
        """Draw a new sample: whoever advances stays, those who did not answer come last."""
        rules, present = state.rules, state.workers
        answered = {ticket.worker for ticket in state.received}
        if rules.secret is not None:
            return tuple(n for n in _drawn(state, rules.secret, present) if n not in answered)
        size, draw = rules.ask(len(present)), Draw(rules.seed, state.round, state.draws)
        staying = {n for n in present if n in answered or state.advancing(n)}
        others = [name for name in present if name not in staying]
        room, candidates = size - len(staying), state.candidates(others)
        drawn = chosen_by(rules.selection, candidates, room, draw, last=state.asked)
        return tuple(sorted(n for n in (*staying, *drawn) if n not in answered))

    def idle(self, state: State, worker: str) -> tuple[str, ...]:
        """Ask whoever joins late, unless the round is that of a sample it would not be in."""
        rules = state.rules
        if rules.secret is not None:
            return _drawn(state, rules.secret, (worker,))
        return () if rules.samples else (worker,)

    def closes(self, state: State, now: float) -> bool:
        """Close when all have answered, or at the end of the grace."""
        return not state.tally.unfolded or now >= self.wakeup(state)

    def wakeup(self, state: State) -> float:
        """Return when the grace ends."""
        return math.inf if state.quorum_at is None else state.quorum_at + state.rules.grace_s


def _drawn(state: State, secret: int, workers: Iterable[str]) -> tuple[str, ...]:
    """Return those whose lot of this round is drawn: the same, however often it is asked.

    The accounting of privacy knows of no other reason to be in a sample, or not to be.
    """
    return tuple(by_chance(sorted(workers), state.rules.fraction, Draw(secret, state.round)))


QUORUM = QuorumRounds()
"""The schedule of a run that names none."""
