"""The norms of updates: which is an outlier among the others, and how large one may be to count.

An update is compared with the median of its round's norms or, while that says little, with those of
the last rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median_low

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.effects import Effects
from fluffle_coordinator.machine.state import State

_OUTLIER_RATIO = 10.0
_ROUNDS_REMEMBERED = 5  # short, because norms usually fall during a run


def with_median(medians: tuple[float, ...], norms: Iterable[float]) -> tuple[float, ...]:
    """Return the medians of the last rounds' norms, with that of one more round.

    Each median is the lower one, so that one outlier among two norms does not raise it. Norms of 0
    do not count.
    """
    positive = [norm for norm in norms if norm > 0]
    return (*medians, median_low(positive))[-_ROUNDS_REMEMBERED:] if positive else medians


def report_outliers(state: State, out: Effects) -> State:
    """Report updates whose norm is above ten times the median of the round's norms.

    The median of one or two norms exposes no outlier, so these are compared with that of the last
    rounds. An outlier enters it too, but as a minority it does not change a median.
    """
    norms = {ticket: norm for ticket, norm in state.norms.items() if norm > 0}
    if not norms:
        return state
    medians = with_median(state.median_norms, norms.values())
    median = median_low(medians) if len(norms) <= 2 else medians[-1]
    for (worker, _), norm in sorted(norms.items()):
        if norm > _OUTLIER_RATIO * median:
            outlier = run_events.Outlier(round=state.round, worker=worker, norm=norm, median=median)
            out.append(outlier)
    return state.replace(median_norms=medians)


def max_norm(state: State) -> float:
    """Return the largest norm that an update may have to be counted; infinity without a limit."""
    ratio = state.rules.max_norm_ratio
    if ratio is None:
        return math.inf
    if state.median_norms:
        return ratio * median_low(state.median_norms)
    norms = [norm for norm in state.norms.values() if norm > 0]
    return ratio * median_low(norms) if len(norms) >= 2 else math.inf
