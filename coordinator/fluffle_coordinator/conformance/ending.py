"""Scenarios of the end: what was seen all along, a stop, and a refusal."""

from __future__ import annotations

import asyncio

from fluffle_common.protocol.messages import Bye, Heartbeat, Hello, Refusal, Stop
from fluffle_coordinator.conformance.findings import Skipped, Unmet, check_rhythm
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.scenario import FROM_COORDINATOR, LIFE, MESSAGE, demands

_LOOK_EVERY_S = 0.2
_FAULTS_SHOWN = 3


@demands(LIFE, "five heartbeats in a row never fail to come, also during training")
async def heartbeats(probe: Probe) -> str:
    """Look back at all signs of life."""
    return check_rhythm(probe.signs, asyncio.get_running_loop().time())


@demands(LIFE, "the session changes only when the process starts anew")
async def one_session(probe: Probe) -> str:
    """Look back at who spoke."""
    sessions = {one.message.session for one in probe.signs}
    if len(sessions) > 1:
        raise Unmet(f"{len(sessions)} sessions: it started anew meanwhile, or changes it")
    return "one session"


@demands(
    MESSAGE,
    "every message is well-formed, under its routing key, with its type and a message_id; updates, "
    "evaluations, first weights and failures are persistent",
)
async def well_formed(probe: Probe) -> str:
    """Look back at all that was wrong."""
    faults = list(dict.fromkeys(probe.faults))
    if faults:
        more = f"; and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise Unmet("; ".join(faults[:_FAULTS_SHOWN]) + more)
    return f"{len(probe.signs) + len(probe.answers)} messages"


@demands(FROM_COORDINATOR, "a stop of its run lets a worker leave, with a bye, or wait for another")
async def stop(probe: Probe) -> str:
    """End the run."""
    since = len(probe.signs)
    await probe.send(
        Stop(
            federation=probe.topology.federation,
            run=probe.run,
            round=probe.round,
            outcome="finished",
            reason="the conformance check is done",
        )
    )

    def find() -> str | None:
        later = [one.message for one in probe.signs[since:]]
        if any(isinstance(one, Bye) for one in later):
            return "it left, with a bye"
        # The second one was said well after the stop.
        beats = [one for one in later if isinstance(one, Heartbeat) and one.state == "idle"]
        return "it stays, idle" if len(beats) > 1 else None

    return await probe.until(find, "bye")


@demands(FROM_COORDINATOR, "a refusal of its session lets a worker leave")
async def refusal(probe: Probe) -> str:
    """Refuse the worker when it has been started once more."""
    if not probe.how.twice:
        raise Skipped("a worker ends only once; --twice waits until it is started again")
    first = {one.message.session for one in probe.signs}
    probe.how.tell(f"start worker {probe.worker} once more, to be refused")

    def find() -> Hello | None:
        hellos = (one.message for one in probe.signs if isinstance(one.message, Hello))
        return next((one for one in hellos if one.session not in first), None)

    again = await probe.until(find, "hello of another session", within_s=probe.how.patience_s)
    await probe.send(
        Refusal(
            federation=probe.topology.federation,
            session=again.session,
            code="model",
            reason="a trial of what follows from a refusal",
        )
    )
    try:
        async with asyncio.timeout(probe.how.patience_s):
            while not await probe.gone():  # noqa: ASYNC110 - the broker tells nobody of it
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError:
        raise Unmet(f"it still reads its inbox after {probe.how.patience_s:g} s") from None
    return "it left"


LOOKING_BACK = (one_session, well_formed)
ENDING = (heartbeats, one_session, well_formed, stop, refusal)
