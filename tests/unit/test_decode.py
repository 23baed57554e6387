"""Decoding messages for display, and formatting them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fluffle_broker.cli.tap import TapPrinter
from fluffle_broker.inspect.archive import MessageArchive
from fluffle_broker.inspect.decode import decode_message, part_of
from fluffle_broker.inspect.formatting import facts
from fluffle_broker.inspect.tap import Wanted
from fluffle_common.cli.printing import echo_json
from fluffle_common.protocol.messages import Evaluation, Event, EventRecord, Events, Hello, Update
from fluffle_common.protocol.topology import Queue
from fluffle_common.protocol.wire_format import PART_BYTES, encode, lay_out
from fluffle_common.transport.base import Delivery, Properties
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.messaging import Route, send_tensors


def update(**more: object) -> Update:
    fields = {"run": "r", "round": 7, "base": "b", "worker": "w1", "num_examples": 120, **more}
    return Update(federation="f", seconds=0.5, metrics={"loss": 0.25}, **fields)


async def through(*bodies: bytes, **properties: object) -> list[Delivery]:
    """Send bodies through a queue of an in-memory broker."""
    link = await MemoryBroker().open()
    await link.declare([Queue("q", "of a test")])
    for body in bodies:
        await link.publish(body, Properties(**properties), exchange="", keys=["q"])
    return [await link.get("q") for _ in bodies]


async def sent(weights: dict) -> list[Delivery]:
    link = await MemoryBroker().open()
    await link.declare([Queue("q", "of a test")])
    await send_tensors(link, update(), weights, Route("", ["q"]))
    deliveries = []
    while (delivery := await link.get("q")) is not None:
        deliveries.append(delivery)
    return deliveries


async def test_an_update_is_decoded_with_its_tensors():
    weights = {
        "kernel": np.array([[3.0, 4.0], [0.0, 0.0]], np.float32),
        "count": np.array(-5, np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "odd": np.array([1.0, np.nan, np.inf, -np.inf], np.float64),
    }
    (delivery,) = await sent(weights)
    decoded = decode_message(delivery, "f")
    kernel, count, empty, odd = decoded.tensors
    assert (decoded.kind, decoded.worker, decoded.round, decoded.wrong) == ("update", "w1", 7, None)
    assert (kernel.shape, kernel.dtype, kernel.norm) == ((2, 2), "float32", 5.0)
    assert (kernel.min, kernel.max, kernel.mean, kernel.nan, kernel.inf) == (0, 4, 1.75, 0, 0)
    assert (count.shape, count.min, count.norm) == ((), -5.0, 5.0)
    assert (empty.shape, empty.min, empty.nan) == ((0, 3), None, 0)
    assert (odd.nan, odd.inf, odd.mean, odd.norm) == (1, 2, 1.0, 1.0)
    assert facts(decoded) == ["round 7", "120 examples", "loss 0.25"]


async def test_an_encoded_update_shows_its_encoded_tensors():
    tensors = {"w#q": np.ones(3, np.int8), "w#scale": np.ones(1, np.float32)}
    table, pieces = lay_out(tensors)
    (delivery,) = await through(encode(update(encoding="int8", tensors=table), pieces))
    decoded = decode_message(delivery, "f")
    assert [tensor.name for tensor in decoded.tensors] == ["w#q", "w#scale"]
    assert facts(decoded) == ["round 7", "120 examples", "encoded as int8", "loss 0.25"]


async def test_a_tensor_without_a_finite_norm_is_valid_json():
    (delivery,) = await sent({"huge": np.array([1e300, 1e300])})
    decoded = decode_message(delivery, "f")
    assert decoded.tensors[0].norm is None
    assert decoded.tensors[0].max == 1e300
    fields = json.loads(json.dumps(decoded.as_dict(0.0), allow_nan=False))
    assert fields["num_examples"] == 120


async def test_tensors_of_a_transfer_have_no_statistics():
    announced, *parts = await sent({"kernel": np.zeros(PART_BYTES // 4 + 1, np.float32)})
    decoded = decode_message(announced, "f")
    assert decoded.tensors[0].shape == (PART_BYTES // 4 + 1,)
    assert decoded.tensors[0].norm is None
    assert decoded.transfer.parts == len(parts) == 2
    assert "its tensors are sent separately, in 2 parts, 4.2 MB" in facts(decoded)
    assert [part_of(decode_message(part, "f")) for part in parts] == [(1, 2), (2, 2)]
    assert facts(decode_message(parts[1], "f")) == ["part 2 of 2"]
    assert part_of(decoded) is None


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "msgpack"),
        (b"\x92\xff", "map"),
        (bytes(range(200)), "msgpack"),
        (encode(update())[:-1], "payload"),
        (encode(update(), b"x" * 64), "belong to no tensor"),
        (encode(update().model_copy(update={"federation": "other"})), "federation other"),
    ],
)
async def test_an_invalid_message_has_a_reason_and_its_first_bytes(body, word):
    (delivery,) = await through(body, type="update", headers={"worker": "w9", "round": 3})
    decoded = decode_message(delivery, "f")
    assert word in decoded.wrong
    fields = decoded.as_dict(0.0)
    assert fields["first_bytes"] == body[:48].hex(" ")
    assert fields["kind"] == "update"
    if decoded.message is None:
        assert (decoded.worker, decoded.round) == ("w9", 3)
    assert any(word in fact for fact in facts(decoded))


async def test_facts_of_a_heartbeat():
    hello = Hello(
        federation="f", worker="w1", session="s", num_examples=5, task="t", heartbeat_s=1,
        state="training", run="r", round=2, step=3, steps=8, loss=1.5,
    )  # fmt: skip
    (delivery,) = await through(encode(hello))
    phrases = facts(decode_message(delivery, "f"))
    assert phrases == ["round 2", "5 examples", "training 3/8", "loss 1.5"]


async def test_facts_of_a_journal_event():
    fields = {"round": 2, "asked": ["a", "b"], "needed": 3, "timings": {"open_s": 1.0}}
    event = Event(federation="f", event="opened", time="t", session="s", number=1, fields=fields)
    (delivery,) = await through(encode(event))
    sentences = ["round 2: opened for a, b; 3 updates needed"]
    assert facts(decode_message(delivery, "f")) == sentences


async def test_several_journal_events_are_counted():
    records = [EventRecord(event=event, time="t") for event in ("opened", "counted", "counted")]
    events = Events(federation="f", session="s", number=1, events=tuple(records))
    (delivery,) = await through(encode(events))
    assert facts(decode_message(delivery, "f")) == ["1 x opened, 2 x counted"]


async def test_an_event_that_anyone_sent_can_be_shown_as_json(tmp_path, capsys):
    fields = {"bytes": b"\xff", "nan": math.nan, "list": [math.inf, [b""]], "map": {b"k": 1}}
    event = Event(federation="f", event="x", time="t", session="s", number=1, fields=fields)
    (delivery,) = await through(encode(event))
    decoded = decode_message(delivery, "f")
    saved = MessageArchive(tmp_path).save(decoded, now=0.0).with_suffix(".json").read_text()
    TapPrinter(Wanted(), as_json=True).show(decoded)
    echo_json(decoded.as_dict(0.0))
    line, _, peeked = capsys.readouterr().out.partition("\n")
    for text in (saved, line, peeked):
        shown = json.loads(text, parse_constant=pytest.fail)
        assert shown["fields"] == {
            "bytes": "b'\\xff'", "nan": None, "list": [None, ["b''"]], "map": {"b'k'": 1}
        }  # fmt: skip


async def test_a_saved_message_is_its_body_and_a_description(tmp_path):
    evaluation = Evaluation(
        federation="f", run="r", round=4, base="b", worker="w.1", num_examples=3, loss=math.pi
    )
    bodies = [encode(evaluation), b"junk"]
    first, second = await through(*bodies, type="../../evil", headers={"worker": "../x"})
    folder = MessageArchive(tmp_path / "kept")
    names = [folder.save(decode_message(each, "f"), now=0.0) for each in (first, second)]
    assert [name.read_bytes() for name in names] == bodies
    assert [name.name.split("-", 1)[1] for name in names] == [
        "000001-evaluation-w.1-round-4.msgpack",
        "000002-unreadable.msgpack",
    ]
    assert json.loads(names[0].with_suffix(".json").read_text())["loss"] == math.pi
    assert len(list((tmp_path / "kept").iterdir())) == 4


async def test_saved_messages_sort_by_arrival_though_the_clock_is_set_back(tmp_path):
    folder = MessageArchive(tmp_path)
    messages = [decode_message(each, "f") for each in await through(b"a", b"b", b"c")]
    names = [folder.save(each, now) for each, now in zip(messages, (7200, 3600, 9000), strict=True)]
    assert sorted(names) == names


async def test_no_number_of_a_sender_makes_invalid_json():
    [delivery] = await through(b"", headers={"share": math.nan, "round": 7})
    shown = decode_message(delivery, "f").as_dict(0.0)
    assert json.loads(json.dumps(shown, allow_nan=False))["headers"] == {"share": None, "round": 7}
