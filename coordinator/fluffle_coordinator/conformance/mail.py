"""Scenarios of odd mail: what a worker passes over, refuses, or waits for the rest of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from fluffle_common.protocol.codec import PART_BYTES, encode, lay_out, pack
from fluffle_common.protocol.messages import (
    Bye,
    Fit,
    Heartbeat,
    Part,
    Refusal,
    Stop,
)
from fluffle_common.tensors.layout import as_maps
from fluffle_common.tensors.weights import size_bytes
from fluffle_coordinator.conformance.findings import Skipped, Unmet
from fluffle_coordinator.conformance.listener import RUNS
from fluffle_coordinator.conformance.probe import Probe, a_name, altered
from fluffle_coordinator.conformance.scenario import (
    FROM_COORDINATOR,
    LIFE,
    MESSAGE,
    PARTS,
    REFUSED,
    demands,
)

_UNKNOWN = "conformance_later"


@demands(MESSAGE, "keys that a worker does not know are passed over, and so are ext and pad")
async def unknown_keys(probe: Probe) -> str:
    """Send work of a later version of this one."""
    fit = probe.next_fit()
    plan = {**fit.plan.model_dump(exclude_none=True), _UNKNOWN: {"a": [1, None]}}
    changes = {_UNKNOWN: [1, {"b": 2.5}], "ext": {"mine": "yours"}, "plan": plan}
    await probe.update(await probe.ask(fit, changes=changes))
    return "the update"


@demands(MESSAGE, "a message whose critical lists a key that the worker does not know is refused")
async def unknown_critical_key(probe: Probe) -> str:
    """Send work that is not what it looks like."""
    changes = {_UNKNOWN: 1, "critical": ["base", _UNKNOWN]}
    refused = await probe.ask(probe.next_fit(), changes=changes)
    await probe.read_by_now()
    if taken := probe.took(refused):
        raise Unmet(f"it took the work: {taken}")
    await probe.update(await probe.ask(probe.next_fit()))
    failed = probe.failure_of(refused)
    return f"a failure: {failed.reason}" if failed else "passed over"


@demands(
    FROM_COORDINATOR,
    "what is malformed, of another federation or of an unknown kind is passed over; the worker "
    "goes on",
)
async def mail_for_nobody(probe: Probe) -> str:
    """Send what is no mail, and then work."""
    elsewhere = probe.asking(probe.next_fit())
    _, body, _ = pack(elsewhere.fit, _small(probe))
    header, _ = msgpack.unpackb(body)
    odd = [
        b"",
        b"not a message",
        body[:-1],
        body + b"\0",
        msgpack.packb(header),
        altered(body, {"kind": "exploit"}),
        altered(body, {"kind": "update"}),
        altered(body, {"protocol": 1}),
        altered(body, {"round": True}),
        altered(body, {"federation": "another"}),
    ]
    for each in odd:
        await probe.deliver(each, "fit")
    await probe.read_by_now()
    if taken := probe.took(elsewhere):
        raise Unmet(f"it took one of them for work: {taken}")
    await probe.update(await probe.ask(probe.next_fit()))
    return f"{len(odd)} odd messages passed over, then the update"


@demands(REFUSED, "a fit whose tensors are not what it says, or not finite, is refused")
async def unsound_weights(probe: Probe) -> str:
    """Send work that cannot be done as it is."""
    refused = []
    for body, fit in unsound_fits(probe):
        refused.append(probe.asking(fit))
        await probe.deliver(body, "fit")
        await probe.read_by_now()
    for asked in refused:
        if taken := probe.took(asked):
            raise Unmet(f"it took the work of round {asked.fit.round}: {taken}")
    await probe.update(await probe.ask(probe.next_fit()))
    return f"{len(refused)} refused"


def unsound_fits(probe: Probe) -> Iterator[tuple[bytes, Fit]]:
    """Yield bodies that look like work."""
    weights = _small(probe)
    table, pieces = lay_out(weights)
    payload = b"".join(pieces)
    maps = as_maps(table)

    def fit(entries: list[dict[str, Any]], data: bytes) -> tuple[bytes, Fit]:
        one = probe.next_fit()
        header = one.model_dump(exclude={"tensors", "pad"}, exclude_none=True)
        return msgpack.packb([{**header, "tensors": entries}, data]), one

    first, *others = [dict(entry) for entry in maps]
    yield fit([first, *others], payload + bytes(64))
    yield fit([first, *others], payload[:-1])
    yield fit([{**first, "dtype": "complex64"}, *others], payload)
    yield fit([{**first, "shape": [*first["shape"], 2]}, *others], payload)
    yield fit([first, first, *others], payload)
    floats = next((entry for entry in maps if entry["dtype"] in ("float32", "float64")), None)
    if floats is not None:
        bad = bytearray(payload)
        nan = np.array([np.nan], floats["dtype"]).tobytes()
        bad[floats["offset"] : floats["offset"] + len(nan)] = nan
        yield fit([first, *others], bytes(bad))


def _small(probe: Probe) -> dict[str, np.ndarray]:
    """Return tensors of the model that go into one message: all of them, if it is small."""
    small: dict[str, np.ndarray] = {}
    for name, tensor in probe.weights.items():
        if tensor.nbytes and size_bytes(small) + tensor.nbytes < PART_BYTES // 2:
            small[name] = tensor
    return small or {"w": np.zeros(4, np.float32)}


@demands(
    PARTS,
    "a model whose last part does not come is waited for, as receiving, and taken when all of it "
    "is sent again as a new transfer",
)
async def lost_part(probe: Probe) -> str:
    """Send a model in parts, and lose the last."""
    parts = _in_parts(probe)
    since = len(probe.signs)
    asked = await probe.ask(probe.next_fit(), lose=[parts - 1])
    await probe.welcome()

    def receiving() -> Heartbeat | None:
        later = (one.message for one in probe.signs[since:])
        beats = (one for one in later if isinstance(one, Heartbeat) and one.state == "receiving")
        return next(beats, None)

    beat = await probe.until(receiving, "heartbeat that says receiving")
    if (beat.run, beat.round) != (probe.run, asked.fit.round):
        raise Unmet(f"it is receiving round {beat.round}, not {asked.fit.round}")
    await _send_strange_parts(probe)
    await probe.update(await probe.ask(asked.fit))
    return f"receiving, {beat.step} of {beat.steps} parts; then the update"


async def _send_strange_parts(probe: Probe) -> None:
    """Send parts that belong to no transfer."""
    for number in (0, 10**6):
        part = Part(federation=probe.topology.federation, transfer="strange", part=number)
        await probe.deliver(encode(part, bytes(64)), "part")


@demands(
    PARTS,
    "a payload of more than 4 MiB goes ahead of its update in parts, and again when the fit comes "
    "again; a digest, if there is one, is that of the parts",
)
async def update_in_parts(probe: Probe) -> str:
    """Fetch an update twice."""
    _in_parts(probe)
    asked = await probe.ask(probe.next_fit())
    first, payload = await probe.update(asked)
    if len(payload) <= PART_BYTES:
        return f"{len(payload):,} bytes, in one piece"
    assert first.transfer is not None
    await probe.idle()
    again, _ = await probe.update(await probe.ask(asked.fit))
    assert again.transfer is not None
    if first.transfer.id == again.transfer.id:
        raise Unmet("the second transfer has the id of the first")
    digest = "with" if first.transfer.digest else "without"
    return f"{first.transfer.parts} parts, twice, {digest} a digest"


def _in_parts(probe: Probe) -> int:
    """Return in how many parts the model travels; 0: it does not."""
    transfer, *_ = pack(probe.next_fit(), probe.weights)
    if transfer is None:
        raise Skipped(
            f"the model has {size_bytes(probe.weights):,} bytes, which go in one piece; --large "
            "adds a tensor of 5 MiB to it"
        )
    return transfer.parts


@demands(LIFE, "a stop of another run, and a refusal of another session, are passed over")
async def end_of_others(probe: Probe) -> str:
    """End what the worker is not in."""
    federation, since = probe.topology.federation, len(probe.signs)
    reason = "a trial: this is not for you"
    other = RUNS + a_name()
    await probe.send(
        Stop(federation=federation, run=other, round=1, outcome="stopped", reason=reason)
    )
    await probe.send(Refusal(federation=federation, session=a_name(), code="model", reason=reason))
    await probe.update(await probe.ask(probe.next_fit()))
    if any(isinstance(one.message, Bye) for one in probe.signs[since:]):
        raise Unmet("it left")
    return "passed over, then the update"


MAIL = (
    unknown_keys,
    unknown_critical_key,
    mail_for_nobody,
    unsound_weights,
    lost_part,
    update_in_parts,
    end_of_others,
)
