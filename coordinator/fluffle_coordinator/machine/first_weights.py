"""The first weights of a new run: which worker is asked for them, and when another one is."""

from __future__ import annotations

import math

from fluffle_common.protocol import events as run_events
from fluffle_coordinator.machine.agreement import refuse_unfit
from fluffle_coordinator.machine.effects import AskInit, Effects
from fluffle_coordinator.machine.events import InitLost, WeightsReady
from fluffle_coordinator.machine.finishing import end, last_failure
from fluffle_coordinator.machine.state import State


def ask_for_weights(state: State, now: float, out: Effects) -> State:
    """Ask one worker for the first weights; the next one if it fails or its time is up."""
    if state.init_asked is not None:
        limit_s = state.rules.deadline_s
        if now < state.init_asked_at + limit_s:
            return state
        name, reason = state.init_asked, f"no first weights within {limit_s:.0f} s (--deadline)"
        out.append(run_events.Failure(worker=name, round=0, reason=reason))
        state = state.replace(init_asked=None, failed=state.failed.insert(name, reason))
    if now < state.init_after < math.inf:
        return state
    state = state.replace(init_after=math.inf)
    enough = state.has_enough_workers
    candidates = list(state.workers.values())
    if not enough:
        # The vote on the model is still to come. A worker that declares nothing cannot lose it.
        candidates = [w for w in candidates if w.model is None and not w.classes]
        if not candidates:
            return state
    able = sorted(worker.name for worker in candidates if worker.name not in state.failed)
    if able:
        # The model of a worker that declares it was compared with the others' models.
        first = next((name for name in able if state.workers[name].model is not None), able[0])
        out += [run_events.Init(worker=first), AskInit(first)]
        return state.replace(init_asked=first, init_asked_at=now)
    if not enough:
        return state
    return end(state, "stopped", f"no first weights; {last_failure(state.failed)}", out)


def init_lost(state: State, event: InitLost, _: object) -> State:
    """Forget who was asked, so that a worker is asked again: at once, or later if that was in vain.

    Otherwise, a worker whose parts never arrive would send them all the time.
    """
    if event.worker != state.init_asked:
        return state
    again_at = event.now + state.rules.resend_s
    in_vain = event.now < state.init_lost_at + state.rules.resend_s
    after = again_at if in_vain else math.inf
    return state.replace(init_asked=None, init_lost_at=event.now, init_after=after)


def weights_ready(state: State, event: WeightsReady, out: Effects) -> State:
    """Note that the first weights are on disk; refuse workers that cannot take what is frozen."""
    state = state.replace(has_weights=True, base=event.base, frozen=event.frozen)
    return refuse_unfit(state, out) if event.frozen else state
