"""The end of a run."""

from __future__ import annotations

from collections.abc import Mapping

from fluffle_coordinator.machine.effects import Effects, End
from fluffle_coordinator.machine.state import Outcome, Phase, State


def end(state: State, outcome: Outcome, reason: str, out: Effects) -> State:
    """End the run; every worker that ever joined it is told."""
    out.append(End(outcome, reason, tuple(sorted(state.met))))
    return state.replace(phase=Phase.ENDED, outcome=outcome, reason=reason)


def last_failure(failed: Mapping[str, str]) -> str:
    """Return one of the failures, as ``worker: reason``: the last by name."""
    worker, reason = max(failed.items())
    return f"{worker}: {reason}"
