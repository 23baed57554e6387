"""The last scenarios: checks of everything received so far, a stop, and a refusal."""

from __future__ import annotations

import asyncio

from fluffle_common.protocol.messages import Bye, Failure, Heartbeat, Hello, Refusal, Stop
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.received import Skipped, Unmet, check_rhythm
from fluffle_coordinator.conformance.scenario import requires

_POLL_S = 0.2
_FAULTS_SHOWN = 3


@requires(
    "Hello and heartbeats",
    "a worker never misses five heartbeats in a row, not even during training",
)
async def heartbeats(probe: Probe) -> str:
    return check_rhythm(probe.messages, asyncio.get_running_loop().time())


@requires("Hello and heartbeats", "a worker's session changes only when its process restarts")
async def one_session(probe: Probe) -> str:
    sessions = _sessions(probe)
    if len(sessions) > 1:
        raise Unmet(
            f"the worker used {len(sessions)} sessions; expected one session until the worker "
            "restarts"
        )
    return "one session"


@requires(
    "Messages",
    "every message is well-formed and has its routing key, its type and a message_id; updates, "
    "evaluations, first weights and failures are persistent",
)
async def well_formed(probe: Probe) -> str:
    faults = list(dict.fromkeys(probe.faults))
    if faults:
        more = f", and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise Unmet(", ".join(faults[:_FAULTS_SHOWN]) + more)
    without = f"; {probe.without_user_id} lack the user_id that --verify-users requires"
    all_are = f"all {len(probe.messages)} messages are well-formed"
    return all_are + (without if probe.without_user_id else "")


@requires("Leaving", "after a stop of its run, a worker sends a bye or waits for another run")
async def stop(probe: Probe) -> str:
    since = len(probe.messages)
    reason = "the conformance check is done"
    await probe.send(Stop(**probe.of_run(), round=probe.round, outcome="finished", reason=reason))

    def find() -> str | None:
        if any(probe.received(Bye, since)):
            return "the worker sent a bye"
        # The first heartbeat may have been sent before the stop arrived.
        beats = [beat for beat in probe.received(Heartbeat, since) if beat.state == "idle"]
        return "the worker stays connected and idle" if len(beats) > 1 else None

    return await probe.until(find, "bye")


@requires("Hello and heartbeats", "a worker leaves when its session is refused")
async def refusal(probe: Probe) -> str:
    if not probe.options.twice:
        raise Skipped("this check needs a restart of the worker; add --twice to wait for a restart")
    earlier = _sessions(probe)
    probe.options.tell(f"start worker {probe.worker} once more; the new session will be refused")
    again = await probe.next(
        Hello,
        0,
        "hello of another session",
        lambda each: each.session not in earlier,
        within_s=probe.options.patience_s,
    )
    federation, session = probe.topology.federation, again.session
    reason = "the conformance check tests a refusal"
    await probe.send(Refusal(federation=federation, session=session, code="model", reason=reason))
    try:
        async with asyncio.timeout(probe.options.patience_s):
            while not await probe.gone():  # noqa: ASYNC110 - the broker does not announce it
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise Unmet(
            f"the worker still consumes from its inbox {probe.options.patience_s:g} s after the "
            "refusal"
        ) from None
    return "the worker left"


def _sessions(probe: Probe) -> set[str]:
    messages = (each.message for each in probe.messages)
    return {
        each.session for each in messages if isinstance(each, Hello | Heartbeat | Bye | Failure)
    }
