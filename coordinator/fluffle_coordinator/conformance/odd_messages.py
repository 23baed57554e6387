"""Scenarios of unusual messages: unknown, malformed, incomplete, large, or for others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgpack
import numpy as np

from fluffle_common.protocol.messages import Bye, Exchange, Fit, Part, Refusal, Stop, Update
from fluffle_common.protocol.transfer_parts import pack
from fluffle_common.protocol.wire_format import PART_BYTES, encode, lay_out
from fluffle_common.tensors.layout import as_maps
from fluffle_common.tensors.weights import size_bytes
from fluffle_coordinator.conformance.listener import RUNS, SentFit
from fluffle_coordinator.conformance.probe import Probe, altered, fresh_name
from fluffle_coordinator.conformance.received import Skipped, Unmet
from fluffle_coordinator.conformance.scenario import requires

_UNKNOWN = "conformance_later"


@requires("Messages", "a worker ignores unknown keys and the keys ext and pad")
async def unknown_keys(probe: Probe) -> str:
    fit = probe.next_fit()
    plan = {**fit.plan.model_dump(exclude_none=True), _UNKNOWN: {"a": [1, None]}}
    changes = {_UNKNOWN: [1, {"b": 2.5}], "ext": {"mine": "yours"}, "plan": plan}
    await probe.update(await probe.ask(fit, changes=changes))
    return "an update"


@requires("Messages", "a worker refuses a message with an unknown key in the list critical")
async def unknown_critical_key(probe: Probe) -> str:
    changes = {_UNKNOWN: 1, "critical": ["base", _UNKNOWN]}
    refused = await probe.ask(probe.next_fit(), changes=changes)
    await _check_not_accepted(probe, refused)
    failure = probe.failure_of(refused)
    return f"a failure ({failure.reason})" if failure else "the message was ignored"


@requires(
    "What a worker refuses",
    "a worker ignores messages that are malformed, sealed, of another federation or of an unknown "
    "kind, and exchanges that it does not know",
)
async def messages_to_ignore(probe: Probe) -> str:
    elsewhere = probe.mark_sent(probe.next_fit())
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
        altered(body, {"sealed": "conformance"}),
        encode(Exchange(**probe.of_run(), round=probe.round, name=_UNKNOWN, phase="first")),
    ]
    for each in odd:
        await probe.deliver(each, "fit")
    await _check_not_accepted(probe, elsewhere)
    return f"{len(odd)} odd messages ignored, then an update"


@requires(
    "What a worker refuses",
    "a worker refuses tensors that are not finite or do not match their header",
)
async def unsound_weights(probe: Probe) -> str:
    refused = []
    for body, fit in unsound_fits(probe):
        refused.append(probe.mark_sent(fit))
        await probe.deliver(body, "fit")
        await probe.read_by_now()
    await _check_not_accepted(probe, *refused)
    return f"{len(refused)} messages refused, then an update"


async def _check_not_accepted(probe: Probe, *refused: SentFit) -> None:
    """Check that a worker accepts none of these fits, but does the sound work that follows.

    It is checked twice, because a worker that sends a heartbeat for each message may still be
    reading when ``read_by_now`` returns.
    """
    await probe.read_by_now()
    _check_no_evidence(probe, refused)
    await probe.update(await probe.ask(probe.next_fit()))
    _check_no_evidence(probe, refused)


def _check_no_evidence(probe: Probe, refused: Iterable[SentFit]) -> None:
    for sent in refused:
        if evidence := probe.accepted(sent):
            raise Unmet(
                f"the worker did not refuse the work for round {sent.fit.round}, but sent "
                f"{evidence}"
            )


def unsound_fits(probe: Probe) -> Iterator[tuple[bytes, Fit]]:
    """Yield bodies of unsound work, each with the ``fit`` in its header."""
    weights = _small(probe)
    table, pieces = lay_out(weights)
    payload = b"".join(pieces)
    maps = as_maps(table)

    def fit(entries: list[dict[str, Any]], data: bytes) -> tuple[bytes, Fit]:
        message = probe.next_fit()
        header = message.model_dump(exclude={"tensors", "pad"}, exclude_none=True)
        return msgpack.packb([{**header, "tensors": entries}, data]), message

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
    """Return as many tensors of the model as fit into one message."""
    small: dict[str, np.ndarray] = {}
    for name, tensor in probe.weights.items():
        if tensor.nbytes and size_bytes(small) + tensor.nbytes < PART_BYTES // 2:
            small[name] = tensor
    return small or {"w": np.zeros(4, np.float32)}


@requires(
    "Large payloads",
    "a worker waits in state receiving while a part of the model is missing, and accepts the model "
    "when all parts are sent again as a new transfer",
)
async def lost_part(probe: Probe) -> str:
    parts = _in_parts(probe)
    sent = await probe.ask(probe.next_fit(), lose=[parts - 1])
    beat = await probe.heartbeat("receiving", "heartbeat in state receiving")
    if (beat.run, beat.round) != (probe.run, sent.fit.round):
        raise Unmet(
            f"the heartbeat in state receiving has run {beat.run} and round {beat.round}; expected "
            f"run {probe.run} and round {sent.fit.round}, as in the 'fit' message"
        )
    for number in (0, 10**6):
        part = Part(federation=probe.topology.federation, transfer="strange", part=number)
        await probe.deliver(encode(part, bytes(64)), "part")
    await probe.update(await probe.ask(sent.fit))
    return f"state receiving with {beat.step} of {beat.steps} parts, then an update"


@requires(
    "Large payloads",
    "a payload of more than 4 MiB is sent in parts before its update, and sent again for a "
    "repeated fit; a digest of the transfer, if present, matches the parts",
)
async def update_in_parts(probe: Probe) -> str:
    _in_parts(probe)
    sent = await probe.ask(probe.next_fit())
    first, payload = await probe.update(sent)
    if len(payload) <= PART_BYTES:
        return f"an update of {len(payload):,} bytes in one message"
    await probe.idle()
    again, _ = await probe.update(await probe.ask(sent.fit))
    if first.transfer is None or again.transfer is None:
        raise Unmet(
            f"the worker sent a payload of {len(payload):,} bytes in one message; expected parts"
        )
    if first.transfer.id == again.transfer.id:
        raise Unmet(
            "the second transfer of the update has the same ID as the first; expected a new ID"
        )
    digest = "with" if first.transfer.digest else "without"
    return f"an update of {first.transfer.parts} parts, sent twice, {digest} a digest"


@requires(
    "Large payloads",
    "a worker that sends digests refuses a model in parts whose digest does not match the "
    "announced digest",
)
async def another_digest(probe: Probe) -> str:
    _in_parts(probe)
    transfers = [each.transfer for each in probe.received(Update) if each.transfer]
    if not any(transfer.digest for transfer in transfers):
        raise Skipped("the worker's updates announce no digest")
    refused = probe.mark_sent(probe.next_fit())
    _, announcement, parts = pack(refused.fit, probe.weights)
    await probe.deliver(announcement, "fit")
    *others, last = parts
    for part in others:
        await probe.deliver(part, "part")
    await probe.deliver(last[:-1] + bytes([last[-1] ^ 0x80]), "part")
    await _check_not_accepted(probe, refused)
    return "the model was refused"


def _in_parts(probe: Probe) -> int:
    """Return the number of parts that the model travels in."""
    transfer, *_ = pack(probe.next_fit(), probe.weights)
    if transfer is None:
        raise Skipped(
            "this check needs a model that is sent in parts, but the model's "
            f"{size_bytes(probe.weights):,} bytes fit into one message; add --large"
        )
    return transfer.parts


@requires("Leaving", "a worker ignores a stop of another run and a refusal of another session")
async def stop_of_another_run(probe: Probe) -> str:
    federation, since = probe.topology.federation, len(probe.messages)
    run, session = RUNS + fresh_name(), fresh_name()
    reason = "the conformance check sends a message for another run or session"
    await probe.send(
        Stop(federation=federation, run=run, round=1, outcome="stopped", reason=reason)
    )
    await probe.send(Refusal(federation=federation, session=session, code="model", reason=reason))
    await probe.update(await probe.ask(probe.next_fit()))
    if any(probe.received(Bye, since)):
        raise Unmet(
            "the worker disconnected because of a message that was meant for another run or session"
        )
    return "both messages ignored, then an update"
