"""Synchronous rounds: a cohort is asked, and the round closes once a quorum has answered.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017, algorithm 1, with a quorum in place of the whole cohort. ``QuorumRounds.needed`` is the
quorum; ``machine.closing`` compares it with the updates in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass

from fluffle_coordinator.machine.schedule import Schedule
from fluffle_coordinator.machine.selection import Draw, by_chance
from fluffle_coordinator.machine.staleness import POLYNOMIAL, Discount
from fluffle_coordinator.machine.state import State


@dataclass(frozen=True)
class QuorumRounds(Schedule[State]):
    """Rounds that close at the quorum, plus a grace for further updates.

    A late update that is at most ``max_staleness`` rounds old counts, discounted, but not towards
    the quorum.
    """

    max_staleness: int = 0
    phi: Discount = POLYNOMIAL

    def __str__(self) -> str:
        """Return the name, with all settings that have an effect."""
        late = f":late=discount,max_staleness={self.max_staleness},staleness={self.phi}"
        return f"quorum{late if self.max_staleness else ''}"

    def discount(self, staleness: int) -> float:
        """Return the factor on the weight of a late update that is so many rounds old."""
        return self.phi(staleness)

    def needed(self, state: State) -> int:
        """Return the quorum of the updates expected; 0 if a Poisson sample is empty."""
        rules, expected = state.rules, state.tally.expected
        if rules.secret is not None and not state.asked:
            return 0
        expected = min(expected, rules.waited_for(len(state.asked)))
        return max(rules.quorum.of(expected), rules.least)

    def cohort(self, state: State) -> tuple[str, ...]:
        """Draw the round's cohort from the workers present."""
        rules = state.rules
        if rules.secret is not None:
            return _drawn(state, rules.secret, state.workers)
        # After a restart, some of the sample may have answered the earlier coordinator.
        counts = rules.samples and rules.selection.fixed
        answered = _answered(state) if counts else frozenset[str]()
        return _selected_beside(answered, state, Draw(rules.seed, state.round))

    def again(self, state: State) -> tuple[str, ...]:
        """Draw a new cohort: workers that advance stay, those that did not answer come last."""
        rules, present = state.rules, state.workers
        if rules.secret is not None:
            return _drawn(state, rules.secret, present)
        answered = _answered(state)
        staying = {n for n in present if n in answered or state.advancing(n)}
        draw = Draw(rules.seed, state.round, state.draws)
        last = state.asked_before.union(state.asked)
        drawn = _selected_beside(staying, state, draw, last=last)
        return tuple(sorted((*staying, *drawn)))

    def idle(self, state: State, worker: str) -> tuple[str, ...]:
        """Return a worker that joins late, unless the round asks only a sample of the workers."""
        rules = state.rules
        if rules.secret is not None:
            return _drawn(state, rules.secret, (worker,))
        return () if rules.samples else (worker,)

    def closes(self, state: State, now: float) -> bool:
        """Whether all expected updates are in the sum, or the grace is over."""
        return not state.tally.unfolded or now >= self.wakeup(state)

    def wakeup(self, state: State) -> float:
        """Return when the grace ends."""
        return math.inf if state.quorum_at is None else state.quorum_at + state.rules.grace_s


def _answered(state: State) -> frozenset[str]:
    of_round = (ticket for ticket, one in state.received.items() if one.round == state.round)
    return frozenset(ticket.worker for ticket in of_round)


def _selected_beside(
    settled: Set[str], state: State, draw: Draw, *, last: Collection[str] = ()
) -> tuple[str, ...]:
    """Select workers for the places that those in ``settled`` leave in the cohort."""
    rules = state.rules
    others = [name for name in state.workers if name not in settled]
    room, least = rules.ask(len(state.workers)) - len(settled), rules.least - len(settled)
    return state.select(others, room, draw, last=last, least=least)


def _drawn(state: State, secret: int, workers: Iterable[str]) -> tuple[str, ...]:
    """Return the workers in the round's Poisson sample: the same ones at every call.

    The privacy accountant assumes that nothing but this chance decides who is in a round.
    """
    return tuple(by_chance(sorted(workers), state.rules.fraction, Draw(secret, state.round)))


QUORUM = QuorumRounds()
"""The schedule of a run that names none."""
