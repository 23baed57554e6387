"""The scenario of frozen tensors, for workers that take them from the federation."""

from __future__ import annotations

from fluffle_common.protocol.messages import Heartbeat, Hello
from fluffle_common.tensors.frozen import frozen_of
from fluffle_common.tensors.groups import FROZEN
from fluffle_coordinator.conformance.findings import Skipped, Unmet
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.scenario import Section, demands


@demands(
    Section.FROZEN,
    "a worker with the feature frozen does not train a fit whose frozen tensors it lacks, and "
    "reports the state receiving; it keeps the frozen tensors that come with a fit, lists their "
    "digest, and then trains without being sent them again",
)
async def frozen_tensors(probe: Probe) -> str:
    """Send work that needs other frozen tensors: without them, with them, and without them."""
    if FROZEN not in _last_sign(probe).features:
        raise Skipped("the worker's features do not list frozen")
    if not probe.frozen:
        raise Skipped("first_weights had no tensors in the group frozen")
    other = frozen_of({name: old + old.dtype.type(1) for name, old in probe.frozen.items()})
    needs = {"frozen": other.digest, "critical": (FROZEN,)}

    sent = await probe.ask(probe.next_fit(**needs))
    await probe.read_by_now()
    state = _last_sign(probe).state
    if probe.updates_of(sent) or state != "receiving":
        raise Unmet(f"the worker is {state} after a fit whose frozen tensors were not sent to it")

    await probe.update(await probe.ask(sent.fit, beside={FROZEN: other.tensors}))
    if other.digest not in (await probe.idle()).frozen:
        raise Unmet(
            "the worker's heartbeat does not list the digest of the tensors that it was sent"
        )

    await probe.update(await probe.ask(probe.next_fit(**needs)))
    return f"{len(probe.frozen)} frozen tensors, sent once for two rounds"


def _last_sign(probe: Probe) -> Hello | Heartbeat:
    """Return the worker's last hello or heartbeat."""
    messages = (each.message for each in reversed(probe.presence))
    return next(each for each in messages if isinstance(each, Hello | Heartbeat))


FROZEN_SCENARIOS = (frozen_tensors,)
