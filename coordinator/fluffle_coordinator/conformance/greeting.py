"""Scenarios of a worker's first minute: it greets, is welcomed, and makes first weights."""

from __future__ import annotations

from fluffle_common.protocol.messages import PROTOCOL, Heartbeat, Hello, InitRequest
from fluffle_common.protocol.model_form import model_form
from fluffle_common.tensors.checkpoint import check_names
from fluffle_common.tensors.groups import FROZEN
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import check_finite
from fluffle_coordinator.conformance.findings import Skipped, Unmet
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.scenario import FROM_COORDINATOR, LIFE, TO_COORDINATOR, demands

_HELLO_AGAIN_S = 5.0


@demands(
    TO_COORDINATOR,
    f"a hello says who the worker is and what it has, and speaks protocol {PROTOCOL}",
    needed=True,
)
async def hello(probe: Probe) -> str:
    """Look at the hello."""
    try:  # heartbeats may be heard before a hello that was returned is said again
        greeted = await probe.sign(Hello, 0, "hello", within_s=_HELLO_AGAIN_S)
    except Unmet:
        if probe.faults:
            raise Unmet(f"malformed: {probe.faults[0]}") from None
        raise Skipped(
            f"worker {_first(probe).worker} was here before; start it after this command"
        ) from None
    if PROTOCOL not in greeted.protocols:
        raise Unmet(f"protocols are {list(greeted.protocols)}")
    return (
        f"worker {greeted.worker}, {greeted.num_examples:,} examples, task '{greeted.task}', "
        f"a heartbeat every {greeted.heartbeat_s:g} s"
    )


@demands(FROM_COORDINATOR, "a welcome is followed by a heartbeat")
async def welcome(probe: Probe) -> str:
    """Welcome it once more, and wait for a sign of life."""
    since = len(probe.signs)
    await probe.welcome()
    beat = await probe.sign(Heartbeat, since, "heartbeat")
    return f"a heartbeat, {beat.state}"


@demands(
    FROM_COORDINATOR,
    "an init_request is answered with first weights: named, finite tensors of the model that the "
    "hello announces",
    needed=True,
)
async def first_weights(probe: Probe) -> str:
    """Ask for the model that everything else begins with."""
    since = len(probe.answers)
    await probe.send(InitRequest(federation=probe.topology.federation, run=probe.run, seed=7))
    groups = await probe.first_weights(since)
    weights = groups[MODEL]
    try:
        if not weights:
            raise ValueError("there is no tensor")
        check_names(weights)
        check_finite(weights)
    except ValueError as wrong:
        raise Unmet(str(wrong)) from None
    form = model_form(weights, groups.get(FROZEN, {}))
    announced = _first(probe).model
    probe.begin_with(weights)
    if announced is not None and announced.digest != form.digest:
        raise Unmet(f"{form.summary} of digest {form.digest}; the hello says {announced.digest}")
    return form.summary


@demands(LIFE, "an idle worker says which round of which run it did last")
async def last_work(probe: Probe) -> str:
    """Let it speak up after a round."""
    asked = await probe.ask(probe.next_fit())
    update = (await probe.update(asked)).update

    beat = await probe.idle()
    if (beat.run, beat.round) != (update.run, update.round):
        raise Unmet(f"it says run {beat.run}, round {beat.round}; it did round {update.round}")
    if beat.base not in (None, update.base):
        raise Unmet(f"it says that it began with {beat.base}, not with {update.base}")
    return f"idle after round {beat.round}"


def _first(probe: Probe) -> Hello | Heartbeat:
    """Return how the worker introduced itself."""
    signs = (one.message for one in probe.signs)
    return next(one for one in signs if isinstance(one, Hello | Heartbeat))


GREETING = (hello, welcome, first_weights)
