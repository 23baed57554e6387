"""The test vectors for a worker in another language: the content of vectors.json."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np

from fluffle_common.protocol import messages as m
from fluffle_common.protocol.transfer_parts import digest_of
from fluffle_common.protocol.wire_format import PART_BYTES, encode, lay_out
from fluffle_common.tensors.codecs.registry import encoding_of
from fluffle_common.tensors.compression import compress, decompress
from fluffle_common.tensors.frozen import frozen_of

F: dict[str, Any] = {"federation": "letters"}
RUN: dict[str, Any] = {**F, "run": "0123456789ab"}
W: dict[str, Any] = {"worker": "client-1"}
WORK: dict[str, Any] = {**RUN, "round": 2, "base": "ba5e"}
ABOUT: dict[str, Any] = {
    **F, **W, "session": "5e5510", "num_examples": 57, "task": "letters",
}  # fmt: skip
UPDATE: dict[str, Any] = {
    **WORK, **W, "num_examples": 51, "seconds": 1.5, "metrics": {"loss": 0.25},
}  # fmt: skip
MODEL = {"kernel": np.array([[0.5, -1.0], [2.0, 0.0]], np.float32), "steps": np.array(3, np.int64)}
CONTROL = {"kernel": np.array([[0.25, 0.0], [0.0, -0.25]], np.float32)}
BACKBONE = frozen_of(
    {"body/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "body/count": np.array(7)}
)


class Grouped(NamedTuple):
    """The tensors of a message that has two groups."""

    model: dict[str, np.ndarray]
    group: str
    others: dict[str, np.ndarray]


Carried = dict[str, np.ndarray] | Grouped
Sound = tuple[str, m.Message, Carried]


def sound() -> Iterator[Sound]:
    """Yield messages of each kind: a name, the message, and its tensors."""
    yield from from_workers()
    yield from from_coordinator()
    yield from with_frozen_tensors()
    yield from others()


def from_workers() -> Iterator[Sound]:
    """Yield what a worker sends."""
    form = m.ModelForm(digest="0123456789abcdef", summary="2 tensors, 5 values")
    yield "hello", m.Hello(**ABOUT, classes=("a", "b"), heartbeat_s=2.0, model=form), {}
    yield "heartbeat", m.Heartbeat(
        **ABOUT, heartbeat_s=2.0, state="training", run=RUN["run"], round=2, base="ba5e", step=3,
        steps=8, loss=0.25,
    ), {}  # fmt: skip
    yield "bye", m.Bye(**F, **W, session="5e5510", reason="stopped by its owner"), {}
    failed = {"session": "5e5510", "run": RUN["run"], "round": 2, "reason": "ValueError: no"}
    yield "failure", m.Failure(**F, **W, **failed), {}
    yield "first weights", m.FirstWeights(**RUN, **W), MODEL
    yield "first weights with statistics", m.FirstWeights(**RUN, **W, statistics=("steps",)), MODEL
    measured = {"num_examples": 6, "loss": 0.5, "metrics": {"accuracy": 0.75}}
    yield "evaluation", m.Evaluation(**WORK, **W, **measured), {}
    yield "update", m.Update(**UPDATE), MODEL
    nbytes = PART_BYTES + 64
    parts = m.Transfer(id="t", parts=2, nbytes=nbytes, digest="0" * 64)
    table = (m.TensorEntry("w", "uint8", (nbytes,), 0, nbytes),)
    yield "update in two parts", m.Update(**UPDATE, transfer=parts, tensors=table), {}
    yield "part", m.Part(**F, transfer="t", part=1), {"w": np.zeros(64, np.uint8)}


def from_coordinator() -> Iterator[Sound]:
    """Yield what a coordinator sends, and the update with the extra tensors that it asks for."""
    yield "welcome", m.Welcome(**RUN, round=2, rounds=6), {}
    yield "refusal", m.Refusal(**F, session="5e5510", code="classes", reason="other classes"), {}
    yield "verdict", m.Verdict(
        **WORK, outcome="rejected", cause="not_finite", reason="tensor 'kernel' has NaN",
        train_again=True,
    ), {}  # fmt: skip
    yield "init request", m.InitRequest(**RUN, seed=0), {}
    plan = m.Plan(epochs=2, learning_rate=0.1, deadline_s=600.0, config={"dropout": 0.5})
    yield "fit", m.Fit(**WORK, evaluate=True, sequence=2, attempt=1, plan=plan), MODEL
    yield "evaluate", m.Evaluate(**WORK), MODEL
    extra = Grouped(MODEL, "extra", CONTROL)
    yield "fit with extra tensors that asks for extra tensors", fit(extra="model"), extra
    yield "fit that asks for an extra scalar", fit(extra={"steps": ()}), MODEL
    yield "update with extra tensors", m.Update(**UPDATE), extra
    yield "stop", m.Stop(**RUN, round=6, reason="6 rounds are done"), {}
    compress = m.Compression.parse("topk:0.01")
    yield "fit that asks for a codec", fit(compress=compress), MODEL
    yield "fit that trains a part of the model", fit(train=("kernel*",)), MODEL


def with_frozen_tensors() -> Iterator[Sound]:
    """Yield messages about a model with frozen tensors."""
    shared = Grouped(MODEL, "frozen", BACKBONE.tensors)
    needs = {"frozen": BACKBONE.digest, "critical": ("frozen",)}
    yield "hello of a worker that holds frozen tensors", m.Hello(
        **ABOUT, heartbeat_s=2.0, features=("frozen",), frozen=(BACKBONE.digest,)
    ), {}  # fmt: skip
    yield "first weights with frozen tensors", m.FirstWeights(**RUN, **W), shared
    asked = m.Fit(**WORK, **needs, evaluate=False, plan=m.Plan())
    yield "fit for a worker that lacks the frozen tensors", asked, shared
    yield "fit for a worker that holds them", asked, MODEL


def others() -> Iterator[Sound]:
    """Yield the messages of multi-phase protocols and of the journal, and optional header keys."""
    phase = {**RUN, "name": "secagg", "phase": "keys", "round": 2}
    yield "exchange", m.Exchange(**phase, **W), {"key": np.arange(32, dtype=np.uint8)}
    yield "exchange from the coordinator, without tensors", m.Exchange(**phase), {}
    yield "signed", m.Stop(
        **RUN, round=6, reason="6 rounds are done", key_id="k1", signature="c2lnbmF0dXJl"
    ), {}  # fmt: skip
    yield "echo", m.Echo(**F, session="c0", number=1), {}
    journal = {**F, "session": "c0", "number": 7}
    recorded = {"event": "joined", "time": "2026-11-24T21:08:44.000+00:00", "run": RUN["run"]}
    fields = {"worker": "client-1", "num_examples": 57}
    yield "event", m.Event(**journal, **recorded, fields=fields), {}
    record = m.EventRecord(**recorded, fields=fields)
    yield "events", m.Events(**journal, events=(record, record)), {}
    yield "message with ext", m.Stop(**RUN, round=6, reason="done", ext={"mine": 1}), {}


def fit(**plan: Any) -> m.Fit:
    """Return a fit with this plan."""
    return m.Fit(**WORK, evaluate=False, plan=m.Plan(**plan))


def packed(message: m.Message, tensors: Carried) -> bytes:
    """Return the body of a message."""
    if isinstance(tensors, Grouped):
        table, pieces = lay_out(tensors.model, {tensors.group: tensors.others})
        return encode(message, pieces, table)
    if isinstance(message, m.Part):
        return encode(message, lay_out(tensors)[1])
    if tensors:
        table, pieces = lay_out(tensors)
        return encode(message, pieces, table)
    return encode(message)


def unsound() -> Iterator[tuple[str, Any, bytes, str]]:
    """Yield unsound updates: what is wrong, the header, the payload, and the rejection's cause."""
    header: dict[str, Any] = {
        "protocol": 2, **RUN, "kind": "update", "round": 2, "base": "ba5e", **W,
        "num_examples": 51, "seconds": 1.5,
        "tensors": [
            {"name": "w", "dtype": "float32", "shape": [2], "offset": 0, "nbytes": 8},
        ],
    }  # fmt: skip
    entry = header["tensors"][0]

    def table(**changes: Any) -> dict[str, Any]:
        return {**header, "tensors": [{**entry, **changes}]}

    two = np.array([1, 2], np.float32).tobytes()
    yield "another version", {**header, "protocol": 1}, two, "malformed"
    yield "a name with a dot", {**header, "federation": "a.b"}, two, "malformed"
    yield "a wildcard for a name", {**header, "worker": "*"}, two, "malformed"
    yield "an unknown kind", {**header, "kind": "exploit"}, two, "malformed"
    yield "no kind", {k: v for k, v in header.items() if k != "kind"}, two, "malformed"
    yield "no base", {k: v for k, v in header.items() if k != "base"}, two, "malformed"
    yield "a number of examples that is a float", {**header, "num_examples": 5.0}, two, "malformed"
    yield "a number of examples that is a bool", {**header, "num_examples": True}, two, "malformed"
    yield "no examples", {**header, "num_examples": 0}, two, "malformed"
    yield "a duration that is NaN", {**header, "seconds": float("nan")}, two, "malformed"
    yield "a metric that is infinite", {**header, "metrics": {"x": float("inf")}}, two, "malformed"
    yield "an unknown key that is critical", {**header, "critical": ["x"], "x": 1}, two, "malformed"
    fit = {**header, "kind": "fit", "evaluate": True}
    yield "a fit whose codec is a string", {**fit, "plan": {"compress": "int8"}}, two, "malformed"
    topk = {"compress": {"kind": "topk", "fraction": 1.5}}
    yield "a fit with a fraction above 1", {**fit, "plan": topk}, two, "malformed"
    yield "a sealed payload", {**header, "sealed": "aes-256-gcm"}, two, "sealed"
    yield "a header that is not a map", [1, 2], two, "malformed"
    yield "an unknown dtype", table(dtype="complex64"), two, "tensors"
    yield "a shape that does not match its bytes", table(shape=[3]), two, "tensors"
    yield "a size that does not match the payload", table(), two + b"\0", "tensors"
    yield "an offset that is not aligned", table(offset=4), b"\0" * 4 + two, "tensors"
    yield "a negative shape", table(shape=[-2]), two, "malformed"
    yield "a duplicate name", {**header, "tensors": [entry, entry]}, two, "tensors"
    yield "a payload that is too short", header, two[:4], "tensors"
    yield "a group whose tensors are not adjacent", {
        **header,
        "tensors": [
            {**entry, "name": name, "offset": 64 * place, **group}
            for place, (name, group) in enumerate(
                [("v", {}), ("c", {"group": "extra"}), ("w", {})]
            )
        ],
    }, bytes(128) + two, "tensors"  # fmt: skip
    yield "an unknown key in an entry", table(x=1), two, "malformed"
    yield "NaN", header, np.array([1, np.nan], np.float32).tobytes(), "not_finite"


def unsound_fits() -> Iterator[tuple[str, Any, bytes, str]]:
    """Yield unsound fits, which a worker must refuse; the items are those of ``unsound``."""
    entry: dict[str, Any] = {
        "name": "w", "dtype": "float32", "shape": [2], "offset": 0, "nbytes": 8,
    }  # fmt: skip
    header: dict[str, Any] = {
        "protocol": 2, **RUN, "kind": "fit", "round": 2, "base": "ba5e", "evaluate": False,
        "plan": {"epochs": 1, "batch_size": 32, "seed": 0}, "tensors": [entry],
    }  # fmt: skip
    parts = {"id": "t", "parts": 2, "nbytes": PART_BYTES + 64}

    def plan(**changes: Any) -> dict[str, Any]:
        return {**header, "plan": {**header["plan"], **changes}}

    def table(*entries: dict[str, Any]) -> dict[str, Any]:
        return {**header, "tensors": list(entries)}

    two = np.array([1, 2], np.float32).tobytes()
    yield "another version", {**header, "protocol": 1}, two, "malformed"
    yield "another federation", {**header, "federation": "digits"}, two, "malformed"
    yield "an unknown key that is critical", {**header, "critical": ["x"], "x": 1}, two, "malformed"
    yield "no base", {k: v for k, v in header.items() if k != "base"}, two, "malformed"
    yield "no plan", {k: v for k, v in header.items() if k != "plan"}, two, "malformed"
    yield "round 0", {**header, "round": 0}, two, "malformed"
    yield "a round that is a bool", {**header, "round": True}, two, "malformed"
    yield "evaluate that is an int", {**header, "evaluate": 1}, two, "malformed"
    yield "a negative attempt", {**header, "attempt": -1}, two, "malformed"
    yield "no epochs", plan(epochs=0), two, "malformed"
    yield "a learning rate of 0", plan(learning_rate=0.0), two, "malformed"
    yield "a learning rate that is NaN", plan(learning_rate=float("nan")), two, "malformed"
    yield "a negative seed", plan(seed=-1), two, "malformed"
    yield "a config that contains a list", plan(config={"x": [1]}), two, "malformed"
    yield "an update instead", {
        **header, "kind": "update", "worker": "client-1", "num_examples": 1, "seconds": 0.0,
    }, two, "kind"  # fmt: skip
    yield "an unknown dtype", table({**entry, "dtype": "complex64"}), two, "tensors"
    yield "a shape that does not match its bytes", table({**entry, "shape": [3]}), two, "tensors"
    yield "a duplicate name", table(entry, entry), two, "tensors"
    yield "more payload than tensors", header, two + bytes(64), "tensors"
    yield "a payload that is too short", header, two[:4], "tensors"
    yield "parts that do not match its bytes", {
        **table({**entry, "dtype": "uint8", "shape": [PART_BYTES + 64], "nbytes": PART_BYTES + 64}),
        "transfer": {**parts, "parts": 3},
    }, b"", "malformed"  # fmt: skip
    yield (
        "a transfer that is larger than its tensors",
        {**header, "transfer": parts},
        b"",
        "tensors",
    )
    yield "NaN", header, np.array([1, np.nan], np.float32).tobytes(), "not_finite"
    yield "an infinity", header, np.array([np.inf, 1], np.float32).tobytes(), "not_finite"


def encodings() -> Iterator[dict[str, Any]]:
    """Yield encoded updates with the delta that each decodes to."""
    rng = np.random.default_rng(0)
    delta = {"w": rng.normal(size=(32, 33)).astype(np.float32)}
    base = {"w": np.zeros((32, 33), np.float32)}
    for compression in ("bf16", "f16", "int8", "topk:0.01"):
        encoding = encoding_of(compression)
        tensors, _ = compress(delta, compression, {})
        decoded = decompress(tensors, encoding, base)["w"]
        message = m.Update(**WORK, **W, num_examples=51, seconds=1.5, encoding=encoding)
        yield {
            "encoding": encoding,
            "body": base64_of(packed(message, dict(tensors))),
            "shape": list(decoded.shape),
            "delta_float32": base64_of(np.asarray(decoded).tobytes()),
        }


def plain(header: Any) -> Any:
    """Return a header as plain JSON, without padding."""
    if isinstance(header, dict):
        return {key: plain(value) for key, value in header.items() if key != "pad"}
    return [plain(value) for value in header] if isinstance(header, list) else header


def base64_of(body: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(body).decode()


def refused(cases: Iterator[tuple[str, Any, bytes, str]]) -> list[dict[str, str]]:
    """Return the vectors of unsound messages."""
    return [
        {"name": name, "body": base64_of(msgpack.packb([header, payload])), "cause": cause}
        for name, header, payload, cause in cases
    ]


def vectors() -> dict[str, Any]:
    """Return the content of vectors.json."""
    good = []
    for name, message, tensors in sound():
        body = packed(message, tensors)
        header, payload = msgpack.unpackb(body)
        good.append(
            {
                "name": name,
                "body": base64_of(body),
                "header": plain(header),
                "payload_bytes": len(payload),
            }
        )
    whole = packed(m.Update(**UPDATE), MODEL)
    malformed = {
        "an empty body": b"",
        "not an array of two": msgpack.packb({"kind": "update"}),
        "one byte too few": whole[:-1],
        "one byte too many": whole + b"\0",
    }
    return {
        "about": "generated by make.py; see docs/protocol.md",
        "sound": good,
        "unsound": [
            *refused(unsound()),
            *(
                {"name": name, "body": base64_of(body), "cause": "malformed"}
                for name, body in malformed.items()
            ),
        ],
        "unsound_fits": refused(unsound_fits()),
        "encoded": list(encodings()),
        "digest": {
            "of": "a payload of zeros, in parts of 4 MiB",
            "nbytes": PART_BYTES + 64,
            "parts": 2,
            "digest": digest_of({"w": np.zeros(PART_BYTES + 64, np.uint8)}),
        },
    }
