"""The first scenarios: hello, welcome, first weights."""

from __future__ import annotations

from fluffle_common.protocol.messages import PROTOCOL, Hello
from fluffle_common.protocol.model_form import model_form
from fluffle_common.tensors.checkpoint import check_names
from fluffle_common.tensors.groups import FROZEN, check_statistics
from fluffle_common.tensors.table import MODEL
from fluffle_common.tensors.weights import check_finite
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.received import Skipped, Unmet, signs_of_life
from fluffle_coordinator.conformance.scenario import requires

_HELLO_AGAIN_S = 5.0


@requires(
    "Hello and heartbeats",
    f"a hello identifies the worker and its data, and offers protocol {PROTOCOL}",
    needed=True,
)
async def hello(probe: Probe) -> str:
    try:  # a worker may send heartbeats before it repeats a hello that was returned to it
        greeting = await probe.next(Hello, 0, "hello", within_s=_HELLO_AGAIN_S)
    except Unmet:
        if probe.faults:
            raise Unmet(probe.faults[0]) from None
        raise Skipped(
            f"worker {probe.worker} was started before this command; stop the worker, and start "
            "it again while this command waits"
        ) from None
    if PROTOCOL not in greeting.protocols:
        raise Unmet(
            f"the hello offers the protocols {list(greeting.protocols)}; expected {PROTOCOL} in "
            "this list"
        )
    return (
        f"worker {greeting.worker}, {greeting.num_examples:,} examples, task '{greeting.task}', "
        f"a heartbeat every {greeting.heartbeat_s:g} s"
    )


@requires("Hello and heartbeats", "a welcome is followed by a heartbeat")
async def welcome(probe: Probe) -> str:
    beat = await probe.heartbeat()
    return f"a heartbeat in state {beat.state}"


@requires(
    "First weights",
    "an init_request is answered with first weights; the first weights are named, finite tensors "
    "of the model that the hello announces",
    needed=True,
)
async def first_weights(probe: Probe) -> str:
    message, groups = await probe.first_weights()
    weights, frozen = groups[MODEL], groups.get(FROZEN, {})
    try:
        if not weights:
            raise ValueError("the worker sent a first_weights message without a tensor")
        check_names(weights)
        check_finite(weights)
        check_statistics(message.statistics, weights)
    except ValueError as why:
        raise Unmet(str(why)) from None
    form = model_form(weights, frozen, message.statistics)
    _, first_sign = signs_of_life(probe.messages)[0]
    announced = first_sign.model
    probe.begin_with(weights, frozen)
    if announced is not None and announced.digest != form.digest:
        raise Unmet(
            f"the first weights are {form.summary} with digest {form.digest}, but the worker's "
            f"hello message announced digest {announced.digest}"
        )
    return form.summary
