"""Makes what a worker in another language is tried against: a schema, and messages to read.

    python docs/protocol/make.py            writes schema.json and vectors.json
    python docs/protocol/make.py --check    ends with 1 if they are not what fluffle says today

``schema.json`` is a JSON schema of every header. ``vectors.json`` holds whole bodies in base64: one
of each kind with the header that it decodes to, others with what is wrong with them and the cause
that they are rejected with, encoded updates with the numbers they stand for, and the digest of a
payload in parts.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from fluffle_common.protocol import messages as m
from fluffle_common.protocol.codec import PART_BYTES, digest_of, encode, lay_out
from fluffle_common.tensors.compression import compress, decompress, encoding_of

HERE = Path(__file__).parent
F: dict[str, Any] = {"federation": "letters"}
RUN: dict[str, Any] = {**F, "run": "0123456789ab"}
W: dict[str, Any] = {"worker": "client-1"}
MODEL = {"kernel": np.array([[0.5, -1.0], [2.0, 0.0]], np.float32), "steps": np.array(3, np.int64)}


def sound() -> Iterator[tuple[str, m.Message, dict[str, np.ndarray]]]:
    """Yield one message of each kind, with its tensors."""
    about = {**F, **W, "session": "5e5510", "num_examples": 57, "task": "letters"}
    of_it = {**RUN, **W, "round": 2, "base": "ba5e"}
    work = {**RUN, "round": 2, "base": "ba5e"}
    form = m.ModelForm(digest="0123456789abcdef", summary="2 tensors, 5 values")
    happened = {"event": "joined", "time": "2026-11-24T21:08:44.000+00:00", "run": "0123456789ab"}
    journal = {**F, "session": "c0", "number": 7}
    fields = {"worker": "client-1", "num_examples": 57}
    yield "hello", m.Hello(**about, classes=("a", "b"), heartbeat_s=2.0, model=form), {}
    yield "heartbeat", m.Heartbeat(
        **about, heartbeat_s=2.0, state="training", run=RUN["run"], round=2, base="ba5e", step=3,
        steps=8, loss=0.25,
    ), {}  # fmt: skip
    yield "bye", m.Bye(**F, **W, session="5e5510", reason="stopped by its owner"), {}
    failed = {"session": "5e5510", "run": RUN["run"], "round": 2, "reason": "ValueError: no"}
    yield "failure", m.Failure(**F, **W, **failed), {}
    yield "first weights", m.FirstWeights(**RUN, **W), MODEL
    yield (
        "evaluation",
        m.Evaluation(**of_it, num_examples=6, loss=0.5, metrics={"accuracy": 0.75}),
        {},
    )
    update = {**of_it, "num_examples": 51, "seconds": 1.5, "metrics": {"loss": 0.25}}
    yield "update", m.Update(**update), MODEL
    parts = m.Transfer(id="t", parts=2, nbytes=PART_BYTES + 64, digest="0" * 64)
    yield (
        "update in two parts",
        m.Update(
            **update,
            transfer=parts,
            tensors=(m.TensorEntry("w", "uint8", (PART_BYTES + 64,), 0, PART_BYTES + 64),),
        ),
        {},
    )
    yield "part", m.Part(**F, transfer="t", part=1), {"w": np.zeros(64, np.uint8)}
    yield "welcome", m.Welcome(**RUN, round=2, rounds=6), {}
    yield "refusal", m.Refusal(**F, session="5e5510", code="classes", reason="other classes"), {}
    yield "verdict", m.Verdict(
        **work, outcome="rejected", cause="not_finite", reason="tensor 'kernel' has NaN",
        train_again=True,
    ), {}  # fmt: skip
    yield "init request", m.InitRequest(**RUN, seed=0), {}
    plan = m.Plan(epochs=2, learning_rate=0.1, deadline_s=600.0, config={"dropout": 0.5})
    yield "fit", m.Fit(**work, evaluate=True, sequence=2, attempt=1, plan=plan), MODEL
    yield "evaluate", m.Evaluate(**work), MODEL
    yield "stop", m.Stop(**RUN, round=6, reason="6 rounds are done"), {}
    yield "echo", m.Echo(**F, session="c0", number=1), {}
    yield "event", m.Event(**journal, **happened, fields=fields), {}
    happening = m.Happening(**happened, fields=fields)
    yield "events", m.Events(**journal, events=(happening, happening)), {}
    yield "keys of a later version", m.Stop(**RUN, round=6, reason="done", ext={"mine": 1}), {}


def packed(message: m.Message, tensors: dict[str, np.ndarray]) -> bytes:
    """Return the body of a message."""
    if isinstance(message, m.Part):
        return encode(message, lay_out(tensors)[1])
    if tensors:
        table, pieces = lay_out(tensors)
        return encode(message, pieces, table)
    return encode(message)


def unsound() -> Iterator[tuple[str, Any, bytes, str]]:
    """Yield what is wrong, the header, the payload, and the cause it is rejected with."""
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
    yield "a header that is no map", [1, 2], two, "malformed"
    yield "an unknown dtype", table(dtype="complex64"), two, "tensors"
    yield "a shape that does not go with its bytes", table(shape=[3]), two, "tensors"
    yield "a size that does not go with the payload", table(), two + b"\0", "tensors"
    yield "an offset that is not aligned", table(offset=4), b"\0" * 4 + two, "tensors"
    yield "a negative shape", table(shape=[-2]), two, "malformed"
    yield "a name that is there twice", {**header, "tensors": [entry, entry]}, two, "tensors"
    yield "too short a payload", header, two[:4], "tensors"
    yield "NaN", header, np.array([1, np.nan], np.float32).tobytes(), "not_finite"


def encodings() -> Iterator[dict[str, Any]]:
    """Yield encoded tensors with the delta that they stand for."""
    rng = np.random.default_rng(0)
    delta = {"w": rng.normal(size=(32, 33)).astype(np.float32)}
    base = {"w": np.zeros((32, 33), np.float32)}
    for how in ("bf16", "f16", "int8", "topk:0.01"):
        tensors, _ = compress(delta, how, {})
        stands_for = decompress(tensors, encoding_of(how), base)["w"]
        message = m.Update(
            **RUN,
            **W,
            round=2,
            base="ba5e",
            num_examples=51,
            seconds=1.5,
            encoding=encoding_of(how),
        )
        yield {
            "encoding": encoding_of(how),
            "body": base64.b64encode(packed(message, dict(tensors))).decode(),
            "shape": list(stands_for.shape),
            "delta_float32": base64.b64encode(np.asarray(stands_for).tobytes()).decode(),
        }


def plain(header: Any) -> Any:
    """Return a header as JSON can hold it, without what only fills it up."""
    if isinstance(header, dict):
        return {key: plain(value) for key, value in header.items() if key != "pad"}
    return [plain(value) for value in header] if isinstance(header, list) else header


def vectors() -> dict[str, Any]:
    """Return everything that is in vectors.json."""
    good = []
    for name, message, tensors in sound():
        body = packed(message, tensors)
        header, payload = msgpack.unpackb(body)
        good.append(
            {
                "name": name,
                "body": base64.b64encode(body).decode(),
                "header": plain(header),
                "payload_bytes": len(payload),
            }
        )
    bad = [
        {
            "name": name,
            "body": base64.b64encode(msgpack.packb([header, payload])).decode(),
            "cause": cause,
        }
        for name, header, payload, cause in unsound()
    ]
    whole = base64.b64decode(good[6]["body"])
    bad += [
        {"name": name, "body": base64.b64encode(body).decode(), "cause": "malformed"}
        for name, body in (
            ("nothing", b""),
            ("no array of two", msgpack.packb({"kind": "update"})),
            ("one byte too few", whole[:-1]),
            ("one byte too many", whole + b"\0"),
        )
    ]
    zeros = {"w": np.zeros(PART_BYTES + 64, np.uint8)}
    return {
        "about": "made by make.py; see docs/protocol.md",
        "sound": good,
        "unsound": bad,
        "encoded": list(encodings()),
        "digest": {
            "of": "a payload of zeros, in parts of 4 MiB as ever",
            "nbytes": PART_BYTES + 64,
            "parts": 2,
            "digest": digest_of(zeros),
        },
    }


def files() -> dict[Path, str]:
    """Return what is to be in each file."""
    return {
        HERE / name: json.dumps(value, indent=1) + "\n"
        for name, value in (("schema.json", m.json_schema()), ("vectors.json", vectors()))
    }


def main() -> int:
    """Write the files, or check them."""
    made = files()
    if "--check" in sys.argv:
        return int(any(not p.exists() or p.read_text() != text for p, text in made.items()))
    for path, text in made.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
