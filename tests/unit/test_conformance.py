"""What conformance judges, apart from any broker."""

from __future__ import annotations

import re
from collections import Counter
from typing import ClassVar

import msgpack
import numpy as np
import pytest

from fluffle_common.protocol.messages import Bye, Heartbeat, Hello, Stop, Update
from fluffle_common.protocol.topology import Topology
from fluffle_common.protocol.wire_format import PART_BYTES, decode, encode
from fluffle_coordinator.conformance.examine import SCENARIOS
from fluffle_coordinator.conformance.listener import ExamOptions
from fluffle_coordinator.conformance.probe import Probe, altered
from fluffle_coordinator.conformance.received import (
    Received,
    ReceivedUpdate,
    Unmet,
    check_rhythm,
    same_answer,
)

F = {"federation": "f"}
ABOUT = {**F, "worker": "w", "session": "s", "num_examples": 1, "task": "t", "heartbeat_s": 2.0}


def beats(*times: float) -> list[Received]:
    first, *others = times
    return [Received(first, Hello(**ABOUT)), *(Received(at, Heartbeat(**ABOUT)) for at in others)]


def test_a_rhythm_may_lack_less_than_five_beats():
    assert "a longest pause of 10.0 s" in check_rhythm(beats(0, 2, 12), now=13)
    with pytest.raises(Unmet, match=r"but none for 10\.5 s"):
        check_rhythm(beats(0, 2, 12.5), now=13)
    with pytest.raises(Unmet, match=r"but none for 11\.0 s"):
        check_rhythm(beats(0, 2), now=13)
    with pytest.raises(Unmet, match="sent no heartbeat"):
        check_rhythm([Received(0, Bye(**F, worker="w", session="s", reason=""))], now=1)


def update(transfer: str | None = None, **fields: object) -> ReceivedUpdate:
    parts = {"id": transfer, "parts": 1, "nbytes": 4} if transfer else None
    ids = {**F, "run": "r", "round": 1, "base": "b", "worker": "w", "num_examples": 1}
    return ReceivedUpdate(
        Update.model_validate({**ids, "seconds": 0.5, "transfer": parts, **fields}),
        memoryview(b"same"),
    )


def test_an_answer_is_the_same_under_another_transfer_and_not_after_another_training():
    assert same_answer(update("t1"), update("t2"))
    assert not same_answer(update(), update(seconds=0.6))
    assert not same_answer(update(), update(num_examples=2))
    assert not same_answer(update(), update()._replace(payload=memoryview(b"else")))


def test_an_altered_body_is_the_same_message_but_for_what_was_altered():
    stop = Stop(**F, run="r", round=1, reason="done")
    message, _ = decode(altered(encode(stop), {"run": "another"}))
    assert message == stop.model_copy(update={"run": "another"})
    header, _ = msgpack.unpackb(altered(encode(stop), {"later": 1}))
    assert header["later"] == 1


async def test_what_it_sends_has_the_amqp_headers_of_a_coordinator():
    class Recorder:
        sent: ClassVar = []

        async def publish(self, body, properties, **_):
            self.sent.append((properties.type, properties.headers, len(body)))

    probe = Probe(Recorder(), Topology("f"), ExamOptions(worker="w"))
    probe.begin_with({"w": np.zeros(3, np.float32)}, {})
    await probe.send(probe.next_fit(round=7))
    probe.begin_with({"w": np.zeros(PART_BYTES // 4 + 1, np.float32)}, {})
    await probe.send(probe.next_fit(round=8))
    rounds = [("fit", {"round": 7}), ("fit", {"round": 8})]
    parts = [("part", {"part": 0, "parts": 2}), ("part", {"part": 1, "parts": 2})]
    wanted = [(kind, {**headers, "bytes": ...}) for kind, headers in (*rounds, *parts)]
    assert [(kind, {**headers, "bytes": ...}) for kind, headers, _ in Recorder.sent] == wanted
    assert all(headers["bytes"] == size for _, headers, size in Recorder.sent)


def test_every_scenario_has_a_name_of_its_own_and_a_requirement_in_a_sentence():
    assert max(Counter(one.name for one in SCENARIOS).values()) == 1
    for one in SCENARIOS:
        assert re.fullmatch(r"[a-z ]{3,30}", one.name)
        assert len(one.requirement.split()) > 5
