"""Encoding and decoding of messages: round trips, and MalformedMessage from hostile bytes."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any, get_args
from unittest import mock

import msgpack
import numpy as np
import psutil
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import messages
from fluffle_common.protocol import wire_format as wire
from fluffle_common.protocol.messages import (
    Evaluate,
    Evaluation,
    Fit,
    Heartbeat,
    Hello,
    Message,
    Part,
    Plan,
    Transfer,
    Update,
)
from fluffle_common.protocol.messages.parsing import _KINDS, _adapter
from fluffle_common.protocol.transfer_parts import Assembly, digest_of, pack
from fluffle_common.protocol.wire_format import decode, describe, encode, read_tensors
from fluffle_common.tensors.table import MAX_TENSORS
from fluffle_common.tensors.weights import BFLOAT16, DTYPES, Weights

DIGEST = "0" * 64
MiB = 2**20


# --- round trips -------------------------------------------------------------------------------


def _views() -> st.SearchStrategy[Callable[[np.ndarray], np.ndarray]]:
    """Functions that change the memory layout of an array."""
    return st.sampled_from(
        [
            lambda a: a,
            lambda a: a.T,
            lambda a: a[::2] if a.ndim else a,
            lambda a: a[..., ::-1] if a.ndim else a,
            np.asfortranarray,
            lambda a: a.astype(a.dtype.newbyteorder(">")),
            lambda a: a.astype(a.dtype.newbyteorder(">")).T,
            lambda a: np.broadcast_to(a, (3, *a.shape)),
        ]
    )


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    if dtype == "bfloat16":  # hypothesis does not know it
        array = draw(hnp.arrays(np.uint16, shape)).view(BFLOAT16)
    else:
        array = draw(hnp.arrays(dtype, shape))  # floats include NaN and infinity
    return draw(_views())(array)


names = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
weight_sets = st.dictionaries(names, tensors(), max_size=6)


def little(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def assert_same(got: Weights, sent: Weights) -> None:
    assert list(got) == list(sent)
    for name, array in sent.items():
        assert got[name].shape == array.shape
        assert got[name].dtype.name == array.dtype.name
        assert got[name].tobytes() == little(array)


def update(**changes: Any) -> Update:
    fields: dict[str, Any] = {
        "federation": "f",
        "run": "r",
        "round": 3,
        "base": "b",
        "worker": "w",
        "num_examples": 5,
        "seconds": 1.5,
    }
    return Update(**(fields | changes))


@given(weight_sets, st.text("abc-_", min_size=0, max_size=60))
def test_weights_come_back_bit_for_bit(weights, tail):
    sent = update(federation=f"f{tail}", metrics={"loss": 0.5})
    transfer, body, parts = pack(sent, weights)
    assert list(parts) == []
    assert transfer is None
    got, payload = decode(body)
    table, _ = wire.lay_out(weights)
    assert got.model_copy(update={"pad": b""}) == sent.model_copy(update={"tensors": table})
    assert_same(read_tensors(got.tensors, payload), weights)


@given(weight_sets, st.text("abc", max_size=63))
def test_every_tensor_starts_at_a_multiple_of_64_of_the_body(weights, tail):
    _, body, _ = pack(update(federation=f"f{tail}"), weights)
    table, pieces = wire.lay_out(weights)
    start = len(body) - sum(map(len, pieces))
    for entry in table:
        assert entry.offset % 64 == 0
        if entry.nbytes:
            at = start + entry.offset
            assert at % 64 == 0
            assert body[at : at + entry.nbytes] == little(weights[entry.name])


@given(weight_sets)
def test_a_body_is_one_msgpack_document_that_any_library_reads(weights):
    header, payload = msgpack.unpackb(pack(update(), weights)[1])
    assert (header["protocol"], header["kind"], header["round"]) == (2, "update", 3)
    for entry in header["tensors"]:
        flat = np.frombuffer(payload[entry["offset"] : entry["offset"] + entry["nbytes"]], np.uint8)
        assert flat.tobytes() == little(weights[entry["name"]])


def test_read_tensors_are_read_only_views_of_the_body():
    weights = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(3, dtype=np.int8)}
    _, body, _ = pack(update(), weights)
    message, payload = decode(body)
    for tensor in read_tensors(message.tensors, payload).values():
        assert np.shares_memory(tensor, np.frombuffer(body, np.uint8))
        assert not tensor.flags.writeable


def test_arrays_that_are_ready_are_not_copied():
    array = np.arange(100, dtype=np.float32)
    _, pieces = wire.lay_out({"a": array})
    assert len(pieces) == 1
    assert np.shares_memory(np.frombuffer(pieces[0], np.uint8), array)


@pytest.mark.parametrize("dtype", ["complex64", "bool", "U3", "O", "datetime64[s]", "longdouble"])
def test_unsupported_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="'odd'.*is not supported"):
        pack(update(), {"odd": np.zeros(2, dtype)})


@given(
    weight_sets.filter(lambda w: any(a.nbytes for a in w.values())),
    st.integers(1, 300),
    st.data(),
)
def test_parts_in_any_order_and_more_than_once_make_the_same_weights(weights, size, data):
    with mock.patch.object(wire, "PART_BYTES", size):
        transfer, body, made = pack(update(), weights)
        bodies = list(made)
        message, own = decode(body)
        if not bodies:
            assert transfer is None
            assert_same(read_tensors(message.tensors, own), weights)
            return
        assert len(own) == 0
        assert message.transfer == transfer
        assert len(bodies) == transfer.parts
        order = data.draw(st.permutations(range(len(bodies))))
        again = data.draw(st.lists(st.sampled_from(range(len(bodies))), max_size=10))
        assembly = Assembly(transfer)
        seen: set[int] = set()
        for number in [*again, *order]:
            assert assembly.complete == (len(seen) == len(bodies))
            part, payload = decode(bodies[number])
            assert part.part == number
            # Parts of other transfers are ignored.
            other = part.model_copy(update={"transfer": "other"})
            assembly.add(other, memoryview(bytes(len(payload))))
            assembly.add(part.model_copy(update={"part": len(bodies)}), payload)
            assert assembly.done_parts == len(seen)
            assembly.add(part, payload)
            seen.add(number)
            assert assembly.done_parts == len(seen)
            assembly.add(part, memoryview(bytes(len(payload))))  # a duplicate is ignored
        assert assembly.complete
        whole = assembly.payload()
        assert whole.readonly
        assert_same(read_tensors(message.tensors, whole), weights)


def test_every_transfer_has_a_unique_id(monkeypatch):
    monkeypatch.setattr(wire, "PART_BYTES", 64)
    weights = {"w": np.zeros(100)}
    one, two = pack(update(), weights)[0], pack(update(), weights)[0]
    assert one.id != two.id


def test_a_payload_of_exactly_one_part_travels_in_its_message(monkeypatch):
    monkeypatch.setattr(wire, "PART_BYTES", 64)
    assert pack(update(), {"w": np.zeros(8)})[0] is None
    transfer, _, parts = pack(update(), {"w": np.zeros(9)})
    payload = np.zeros(9).tobytes()
    hashes = [blake3(payload[:64]).digest(), blake3(payload[64:]).digest()]
    digest = blake3(b"".join(hashes)).hexdigest()
    assert transfer == Transfer(id=transfer.id, parts=2, nbytes=72, digest=digest)
    assert digest_of({"w": np.zeros(9)}) == digest
    assert [len(decode(body)[1]) for body in parts] == [64, 8]


# --- invalid parts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "nbytes", "reason"),
    [
        (2049, 2**33 + 1, "too large: 8589934593 bytes; the limit is 8589934592"),
        (49, 200 * MiB, "cannot hold"),
        (51, 200 * MiB, "cannot hold"),
        (10**6, 1, "cannot hold"),
        (1, 2**63, "the announced transfer is too large"),
    ],
)
def test_an_inconsistent_announcement_is_refused(parts, nbytes, reason):
    with pytest.raises(MalformedMessage, match=reason):
        Assembly(Transfer(id="t", parts=parts, nbytes=nbytes, digest=DIGEST))


def test_an_announcement_allocates_almost_no_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    transfer = Transfer(id="t", parts=250, nbytes=1000 * MiB, digest=DIGEST)
    assembly = Assembly(transfer)
    assert process.memory_info().rss - before < 10 * MiB
    assert not assembly.complete


def test_an_announcement_larger_than_memory_is_refused(monkeypatch):
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(MalformedMessage, match="not enough memory for a transfer of 1000 bytes"):
        Assembly(Transfer(id="t", parts=1, nbytes=1000, digest=DIGEST))


@pytest.mark.parametrize(("number", "size"), [(0, 63), (0, 65), (0, 0), (1, 64), (1, 7), (1, 9)])
def test_a_part_of_the_wrong_size_is_refused_and_can_be_sent_again(monkeypatch, number, size):
    monkeypatch.setattr(wire, "PART_BYTES", 64)
    hashes = blake3(b"a" * 64).digest() + blake3(b"b" * 8).digest()
    transfer = Transfer(id="t", parts=2, nbytes=72, digest=blake3(hashes).hexdigest())
    assembly = Assembly(transfer)
    wrong = Part(federation="f", transfer="t", part=number)
    with pytest.raises(MalformedMessage, match=f"part {number} has {size} bytes"):
        assembly.add(wrong, memoryview(bytes(size)))
    assert assembly.done_parts == 0
    for part, right in enumerate((b"a" * 64, b"b" * 8)):
        assembly.add(Part(federation="f", transfer="t", part=part), memoryview(right))
    assert assembly.payload() == b"a" * 64 + b"b" * 8


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "g" * 64])
def test_an_invalid_digest_is_malformed(digest):
    transfer = {"id": "t", "parts": 2, "nbytes": 5 * MiB, "digest": digest}
    refused(packed(header(transfer=transfer)), "transfer.digest")


def test_replaced_parts_are_detected(monkeypatch):
    monkeypatch.setattr(wire, "PART_BYTES", 64)
    transfer, _, bodies = pack(update(), {"w": np.arange(20.0)})
    assembly = Assembly(transfer)
    for number, body in enumerate(bodies):
        part, payload = decode(body)
        assembly.add(part, memoryview(bytes(len(payload))) if number == 1 else payload)
    with pytest.raises(MalformedMessage, match="replaced or damaged") as caught:
        assembly.payload()
    assert caught.value.cause == "tensors"


# --- hostile bytes -----------------------------------------------------------------------------


class peak:
    """Measure the peak of memory that Python allocates in a block."""

    def __enter__(self) -> Callable[[], int]:
        tracemalloc.start()
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]
        self._used = -1
        return lambda: self._used

    def __exit__(self, *_: object) -> None:
        self._used = tracemalloc.get_traced_memory()[1] - self._before
        tracemalloc.stop()


def read(body: bytes) -> None:
    """Decode a body and its tensors as a receiver does."""
    message, payload = decode(body)
    describe(message)
    assert message.identity
    if isinstance(message, messages.WithTensors):
        read_tensors(message.tensors, payload)


def refused(body: bytes, reason: str) -> None:
    read(VALID)  # do not measure lazy imports and caches
    with peak() as used, pytest.raises(MalformedMessage, match=reason) as caught:
        read(body)
    reason = str(caught.value)
    assert 10 <= len(reason) <= 500
    # msgpack always allocates a buffer of 1 MiB.
    assert used() < 1.5 * MiB + 4 * len(body)


def packed(header: Any, payload: bytes = b"") -> bytes:
    return b"\x92" + msgpack.packb(header) + msgpack.packb(payload)


def header(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    fields = update().model_dump(exclude={"pad", "tensors", "transfer"})
    return {**fields, "tensors": list(entries), **changes}


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "w", "dtype": "float32", "shape": [2], "offset": 0, "nbytes": 8} | changes


VALID = packed(header(entry()), bytes(8))


def test_unknown_keys_are_ignored_and_known_critical_keys_are_accepted():
    message, _ = decode(packed(header(later={"deep": [1]}, ext={"mine": "x"}, critical=["round"])))
    assert (message.round, message.ext, message.critical) == (3, {"mine": "x"}, ("round",))
    assert decode(wire.encode(message))[0] == message


HELLO = {"federation": "f", "kind": "hello", "worker": "w", "session": "s", "num_examples": "many"}


@pytest.mark.parametrize("protocol", [1, 2, 7])
def test_a_hello_of_any_version_is_refused_in_that_version(protocol):
    hello = wire.minimal_hello(packed({"protocol": protocol, **HELLO}), "f")
    assert hello == (protocol, "w", "s")
    refusal = messages.Refusal(federation="f", session="s", code="protocol", reason="no")
    answer, payload = msgpack.unpackb(wire.encode_refusal(refusal, protocol))
    frozen = {"protocol": protocol, "federation": "f", "kind": "refusal", "session": "s"}
    assert {**frozen, "reason": "no"} == {k: v for k, v in answer.items() if k != "code"}
    assert ("code" in answer, payload) == (protocol == 2, b"")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "heartbeat"}, {"federation": "g"}, {"worker": "a#"}, {"worker": None},
        {"session": ""}, {"session": "s" * 65}, {"protocol": "1"}, {"protocol": True},
    ],
)  # fmt: skip
def test_a_hello_without_a_valid_identity_is_not_answered(changes):
    assert wire.minimal_hello(packed({"protocol": 1, **HELLO, **changes}), "f") is None
    assert wire.minimal_hello(b"junk", "f") is None
    assert wire.minimal_hello(packed([1]), "f") is None


def test_the_unspoilt_example_is_valid():
    read(VALID)
    read(packed(header(entry(), entry(name="v", offset=64)), bytes(72)))
    read(packed(header()))


@pytest.mark.parametrize(
    ("entries", "payload", "reason"),
    [
        ([entry(shape=[50 * MiB], nbytes=200 * MiB)], 8, "ends at byte 209715200"),
        ([entry(shape=[50 * MiB])], 8, "cannot have 8 bytes"),
        ([entry(nbytes=200 * MiB)], 8, "cannot have 209715200 bytes"),
        ([entry(shape=[-2])], 8, "shape.*greater than or equal to 0"),
        ([entry(shape=[-1, -2])], 8, "shape.*greater than or equal to 0"),
        ([entry(offset=-64)], 8, "offset.*greater than or equal to 0"),
        ([entry(nbytes=-8)], 8, "nbytes.*greater than or equal to 0"),
        ([entry(offset=64)], 8, "ends at byte 72"),
        ([entry(offset=2**64 - 64)], 8, "ends at byte"),
        ([entry(offset=4)], 12, "wrong offset 4"),
        ([entry(), entry(name="v")], 8, "'v' has the wrong offset 0"),
        ([entry(shape=[20], nbytes=80), entry(name="v", offset=64)], 80, "'v' has the wrong"),
        ([entry(offset=64), entry(name="v")], 72, "'v' has the wrong offset 0"),
        ([entry(dtype="complex64", shape=[1])], 8, "unknown dtype 'complex64'"),
        ([entry(dtype="object", shape=[1])], 8, "unknown dtype 'object'"),
        ([entry(dtype=">f4")], 8, "unknown dtype"),
        ([entry(dtype="V8", shape=[1])], 8, "unknown dtype"),
        ([entry(dtype="f4,f4", shape=[1])], 8, "unknown dtype"),
        ([entry(dtype="float32" * 10)], 8, "dtype.*at most 16"),
        ([entry(shape=[3])], 8, "cannot have 8 bytes"),
        ([entry(shape=[])], 8, "cannot have 8 bytes"),
        ([entry(shape=[2, 0])], 8, "cannot have 8 bytes"),
        ([entry(shape=[1] * 33)], 8, "shape.*32"),
        ([entry(shape=[2.0])], 8, "shape"),
        ([entry(shape=["2"])], 8, "shape"),
        ([entry(shape=[True, 2])], 8, "shape"),
        ([entry(shape=[2**62, 0], nbytes=0)], 0, "impossible shape"),
        ([entry(shape=[2**63, 0], nbytes=0)], 0, "impossible shape"),
        ([entry(shape=[2**32, 2**32, 2**32, 0], nbytes=0)], 0, "impossible shape"),
        ([entry(name="")], 8, "name.*at least 1"),
        ([entry(name="n" * 501)], 8, "name.*at most 500"),
        ([entry(name=b"w")], 8, "name"),
        ([entry(more=1)], 8, "more"),
        ([entry(), entry(offset=64)], 72, "'w' appears twice"),
        ([entry()], 9, "1 bytes of the payload belong to no tensor"),
        ([], 8, "8 bytes of the payload belong to no tensor"),
        ([entry()], 7, "ends at byte 8, but the payload has 7 bytes"),
        (["w"], 8, "tensors"),
        ([None], 8, "tensors"),
    ],
)
def test_an_inconsistent_table_is_refused(entries, payload, reason):
    refused(packed(header(*entries), bytes(payload)), reason)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not a msgpack array"),
        (b"\x92", "not valid msgpack"),
        (b"\x91\x80", "not a msgpack array"),
        (b"\x93\x80\xc4\x00\xc0", "not a msgpack array"),
        (b"\xdc\x00\x02\x80\xc4\x00", "not a msgpack array"),
        (b"<html>", "not a msgpack array"),
        (VALID[:-1], "should have 8 bytes, but has 7"),
        (VALID[:-8], "should have 8 bytes, but has 0"),
        (VALID[:-9], "the middle of"),
        (VALID[:-10], "payload is missing"),
        (VALID + b"\x00", "should have 8 bytes, but has 9"),
        (VALID + VALID, "should have 8 bytes"),
        (packed([]), "its type is list"),
        (packed(None), "its type is NoneType"),
        (packed(7), "its type is int"),
        (packed({}), "kind"),
        (packed({"kind": "pickle"}), "^kind: unknown kind 'pickle'$"),
        (packed({"kind": "k" * 999}), f"^kind: unknown kind '{'k' * 40}'$"),
        (packed({"kind": "a\nb"}), r"^kind: unknown kind 'a\\nb'$"),
        (packed({"kind": ["update"]}), "kind"),
        (packed({1: 2}), "not valid msgpack"),
        (packed({b"kind": "update"}), "kind"),
        (packed({"kind": msgpack.Timestamp(1)}), "not valid msgpack"),
        (packed({"kind": msgpack.ExtType(4, b"code")}), "not valid msgpack"),
        (b"\x92\x81\xa4kind\xa2\xff\xfe\xc4\x00", "not valid msgpack"),
        (b"\x92\xc1\xc4\x00", "not valid msgpack"),
        (b"\x92" + msgpack.packb(header()) + b"\xa0", "payload is missing, or is not"),
        (b"\x92" + msgpack.packb(header()) + b"\xc0", "payload is missing, or is not"),
        (
            b"\x92" + msgpack.packb(header()) + b"\xc6\x0c\x80\x00\x00",
            "should have 209715200 bytes",
        ),
        (b"\x92" + msgpack.packb(header()) + b"\xc6\xff\xff\xff\xff", "should have 4294967295"),
    ],
)
def test_a_body_that_is_not_exactly_one_document_is_refused(body, reason):
    refused(body, reason)


@pytest.mark.parametrize(
    ("claim", "kind"),
    [
        (b"\xdb\x0c\x80\x00\x00", "a string of 200 MB"),
        (b"\xc6\x0c\x80\x00\x00", "bytes of 200 MB"),
        (b"\xdd\x0c\x80\x00\x00", "an array of 200 million"),
        (b"\xdd\x01\xff\xff\xff", "an array of 32 million"),
        (b"\xdd\x00\x0f\x42\x40", "an array of a million"),
        (b"\xdf\x0c\x80\x00\x00", "a map of 200 million"),
        (b"\xdf\x00\x0f\x42\x40", "a map of a million"),
        (b"\xc9\x0c\x80\x00\x00\x01", "an extension of 200 MB"),
    ],
)
def test_claimed_sizes_are_not_allocated(claim, kind):
    for before in (b"\x92", b"\x92\x81\xa7tensors", b"\x92\x81\xa7tensors\x91\x81\xa5shape"):
        refused(before + claim, "not valid msgpack")
        refused(before + claim + b"\xc0" * 50, "not valid msgpack")


@pytest.mark.parametrize("depth", [100, 1000, 5000, 100_000])
@pytest.mark.parametrize("unit", [b"\x91", b"\x81\xa1k", b"\xdc\x00\x01"])
@pytest.mark.parametrize("field", sorted(set(header()) - {"federation"}))
def test_deep_nesting_is_refused(depth, unit, field):
    # Appended to the packed bytes, because packing would itself recurse.
    others = {key: value for key, value in header().items() if key != field}
    pairs = b"".join(msgpack.packb(key) + msgpack.packb(value) for key, value in others.items())
    spoilt = msgpack.Packer().pack_map_header(len(others) + 1) + pairs
    body = b"\x92" + spoilt + msgpack.packb(field) + unit * depth + b"\xc0\xc4\x00"
    refused(body, f"{field}|not valid msgpack")


def test_nested_claimed_sizes_are_bounded():
    # Each level may allocate a little; the number of levels is limited.
    for depth in (1000, 100_000):
        with peak() as used, pytest.raises(MalformedMessage, match="not valid msgpack"):
            decode(b"\x92" + b"\xdd\x00\x01\x86\xa0" * depth)
        assert used() < 128 * MiB


@pytest.mark.parametrize("alike", [{"offset": 0.0}, {"offset": False}, {"nbytes": 8.0}])
def test_a_table_with_wrong_types_that_equals_a_cached_one_is_refused(alike):
    right = entry()
    read(packed(header(right), bytes(8)))
    assert {**right, **alike} == right  # Python considers 1, 1.0 and True equal
    refused(packed(header({**right, **alike}), bytes(8)), "tensors.0")
    read(packed(header(right), bytes(8)))


def test_a_table_with_too_many_tensors_is_refused():
    many = [entry(name=f"w{n}", shape=[0], nbytes=0) for n in range(MAX_TENSORS + 1)]
    with pytest.raises(MalformedMessage, match="tensors|array"):
        decode(packed(header(*many)))


def test_a_table_with_as_many_tensors_as_allowed_is_read():
    many = {f"w{n}": np.zeros(0, np.float32) for n in range(10_000)}
    message, payload = decode(pack(update(), many)[1])
    assert_same(read_tensors(message.tensors, payload), many)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 1}, "protocol"),
        ({"federation": "a.b"}, "federation"),
        ({"federation": "a\n"}, "federation"),
        ({"worker": "w#"}, "worker"),
        ({"worker": "*"}, "worker"),
        ({"worker": "w\n"}, "worker"),
        ({"worker": ""}, "worker"),
        ({"worker": "w" * 65}, "worker"),
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": -1}, "num_examples"),
        ({"num_examples": True}, "num_examples"),
        ({"num_examples": 1.0}, "num_examples"),
        ({"num_examples": "5"}, "num_examples"),
        ({"num_examples": 10**12 + 1}, "num_examples"),
        ({"round": 0}, "round"),
        ({"round": 10**9 + 1}, "round"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
        ({"seconds": -1.0}, "seconds"),
        ({"metrics": {"loss": float("nan")}}, "metrics"),
        ({"metrics": {"n" * 65: 1.0}}, "metrics"),
        ({"metrics": {"": 1.0}}, "metrics"),
        ({"metrics": {" \n": 1.0}}, "metrics"),
        ({"metrics": {f"m{n}": 1.0 for n in range(65)}}, "metrics"),
        ({"metrics": {"loss": {"deep": 1.0}}}, "metrics"),
        ({"metrics": [1.0]}, "metrics"),
        ({"run": ""}, "run"),
        ({"run": "r" * 65}, "run"),
        ({"run": None}, "run"),
        ({"base": ""}, "base"),
        ({"base": "b" * 65}, "base"),
        ({"base": 7}, "base"),
        ({"base": None}, "base"),
        ({"tensors": None}, "tensors"),
        ({"transfer": {"id": "t", "parts": 0, "nbytes": 1}}, "transfer"),
        ({"transfer": {"id": "t", "parts": 1, "nbytes": 0}}, "transfer"),
        ({"transfer": {"id": "t", "parts": 10**7, "nbytes": 1}}, "transfer"),
        ({"critical": ["admin"], "admin": 1}, "critical: unknown field 'admin'"),
        ({"critical": "kind"}, "critical"),
        ({"ext": {"deep": {}}}, "ext"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused_by_name(changes, reason):
    refused(packed(header(**changes)), reason)


FIT = Fit(federation="f", run="r", round=1, base="b", evaluate=True, plan=Plan())


@pytest.mark.parametrize(
    "message",
    [
        FIT,
        Evaluate(federation="f", run="r", round=1, base="b"),
        update(),
        Evaluation(
            federation="f", run="r", round=1, base="b", worker="w", num_examples=1, loss=0.5
        ),
    ],
    ids=lambda message: message.kind,
)
def test_work_and_its_answers_name_their_base(message):
    fields = message.model_dump(exclude_none=True)
    assert decode(packed(fields))[0] == message
    del fields["base"]
    refused(packed(fields), "base: Field required")


@pytest.mark.parametrize("kind", [Hello, Heartbeat])
def test_presence_messages_may_name_their_base(kind):
    known = {"federation": "f", "worker": "w", "session": "s", "num_examples": 3, "task": "t"}
    fields = kind(**known, heartbeat_s=1.0).model_dump()
    for says, base in ((fields, None), (fields | {"base": "b"}, "b")):
        assert decode(packed(says))[0].base == base
        assert decode(encode(decode(packed(says))[0]))[0].base == base
    assert "base" not in msgpack.unpackb(encode(kind(**known, heartbeat_s=1.0)))[0]
    refused(packed(fields | {"base": ""}), "base")


@given(st.binary(max_size=300))
def test_random_bytes_are_malformed_or_fine(body):
    for start in (b"", b"\x92", b"\x92\x81\xa4kind\xa6update"):
        try_to_read(start + body)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    weights = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int64(3).reshape(())}
    body = bytearray(
        draw(
            st.sampled_from(
                [
                    pack(update(metrics={"loss": 0.5}), weights)[1],
                    pack(FIT, weights)[1],
                    encode(Part(federation="f", transfer="t", part=0), b"payload"),
                    encode(
                        Heartbeat(
                            federation="f",
                            worker="w",
                            session="s",
                            num_examples=3,
                            task="t",
                            classes=("A", "B"),
                            heartbeat_s=1.0,
                        )
                    ),
                ]
            )
        )
    )
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(body) - 1, 0)))
        match draw(st.sampled_from(["set", "flip", "cut", "insert", "drop", "double"])):
            case "set":
                body[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "flip":
                body[at : at + 1] = bytes(
                    b ^ (1 << draw(st.integers(0, 7))) for b in body[at : at + 1]
                )
            case "cut":
                del body[at:]
            case "insert":
                body[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "drop":
                del body[at : at + draw(st.integers(1, 8))]
            case "double":
                body[at:at] = body[at : at + draw(st.integers(1, 30))]
    return bytes(body)


@given(mutated())
def test_a_spoilt_body_is_malformed_or_fine(body):
    try_to_read(body)


JUNK: list[Any] = [
    {str(number): [] for number in range(8000)},
    {number.to_bytes(2): 0 for number in range(15_000)},
    [{}] * 60_000,
    [{"event": 0, "fields": {bytes([number]): 0 for number in range(200)}}] * 100,
    {str(number): [-1] * 32 for number in range(1000)},
]


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_an_invalid_header_costs_little_time(kind):
    # pydantic describes every error, which takes about ten microseconds.
    model = next(one for one in get_args(Message) if one.model_fields["kind"].default == kind)
    fields = [*model.model_fields.keys() - {"kind"}]
    spoilt = [{name: junk} for name in fields for junk in JUNK]
    if "plan" in fields:
        spoilt += [{"plan": {name: junk}} for name in Plan.model_fields for junk in JUNK]
    for changes in spoilt:
        with pytest.raises(ValidationError) as refused:
            _adapter.validate_python({"kind": kind, **changes})
        assert refused.value.error_count() < 3000, changes.keys()


@pytest.mark.parametrize(("depth", "fine"), [(19, True), (20, False), (500, False)])
def test_the_nesting_of_an_event_is_limited(depth, fine):
    nested: Any = 1
    for number in range(depth):
        nested = [nested] if number % 2 else {"a": nested}
    event = {"kind": "event", "session": "s", "number": 1, "event": "x", "time": "t"}
    body = packed({"protocol": 2, "federation": "f", **event, "fields": {"a": nested}})
    if fine:
        decode(body)
    else:
        refused(body, "nested more than 20 deep")


_any_value: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(["update", "fit", "part", "float32", 0, 1, 2, 8, 64, 2**32, 2**63]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["name", "shape"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(header())), _any_value), max_size=2),
    st.lists(st.tuples(st.sampled_from(sorted(entry())), _any_value), max_size=3),
    st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2]), max_size=4) | st.none(),
    st.binary(max_size=80),
)
def test_a_well_formed_header_with_any_values_is_malformed_or_fine(fields, changes, shape, payload):
    spoilt = entry() | dict(changes)
    if shape is not None:
        spoilt["shape"] = shape
        spoilt["nbytes"] = min(math.prod(shape) * 4, 2**64 - 1)
    try_to_read(packed(header(spoilt, entry(name="v", offset=64)) | dict(fields), payload))
    try_to_read(packed(header(spoilt) | dict(fields), payload))


def try_to_read(body: bytes) -> None:
    try:
        read(body)
    except MalformedMessage as why:
        assert str(why)
        assert len(str(why)) <= 500


def test_parts_without_a_digest_are_not_verified(monkeypatch):
    monkeypatch.setattr(wire, "PART_BYTES", 64)
    assembly = Assembly(Transfer(id="t", parts=1, nbytes=8))
    assembly.add(Part(federation="f", transfer="t", part=0), memoryview(b"anything"))
    assert bytes(assembly.payload()) == b"anything"
