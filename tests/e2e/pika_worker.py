"""A worker written from docs/protocol.md alone: python pika_worker.py URL FEDERATION WORKER."""

import sys
import uuid

import msgpack
import numpy as np
import pika

URL, F, W = sys.argv[1:]
BASE = {"protocol": 1, "federation": F, "worker": W}
HELLO = {"session": uuid.uuid4().hex, "num_examples": 50, "task": "pika", "classes": []}
x = np.random.default_rng(7).normal(size=(50, 3))
y = x @ [2.0, -3.0, 0.5] + 4.0
channel = pika.BlockingConnection(pika.URLParameters(URL)).channel()
channel.confirm_delivery()
for name, more, exchange, key in (
    ("inbox", {"x-max-length-bytes": 8589934592, "x-overflow": "drop-head"}, "work", W),
    ("outbox", {}, "results", f"part.{W}"),
):
    arguments = {"x-queue-type": "classic", "x-expires": 1800000, **more}
    channel.queue_declare(f"{F}.{name}.{W}", durable=True, arguments=arguments)
    channel.queue_bind(f"{F}.{name}.{W}", f"{F}.{exchange}", key)


def send(kind, payload=b"", **fields):
    body = msgpack.packb([{**BASE, "kind": kind, **fields}, payload])
    properties = pika.BasicProperties(type=kind, content_type="application/msgpack")
    channel.basic_publish(f"{F}.results", f"{kind}.{W}", body, properties, mandatory=True)


def fit(header, payload):
    weights = {}
    for t in header["tensors"]:
        part = payload[t["offset"] : t["offset"] + t["nbytes"]]
        weights[t["name"]] = np.frombuffer(part, t["dtype"]).reshape(t["shape"])
    error = x @ weights["slopes"] + weights["intercept"] - y
    step = {"slopes": -0.1 * x.T @ error / 50, "intercept": np.asarray(-0.1 * error.mean())}
    out = bytearray(max(t["offset"] + t["nbytes"] for t in header["tensors"]))
    for t in header["tensors"]:
        out[t["offset"] : t["offset"] + t["nbytes"]] = step[t["name"]].tobytes()
    told = {"num_examples": 50, "seconds": 0.0, "metrics": {}, "tensors": header["tensors"]}
    send("update", bytes(out), run=header["run"], round=header["round"], **told)


send("hello", **HELLO, heartbeat_s=1.0)
for method, _, body in channel.consume(f"{F}.inbox.{W}", exclusive=True, inactivity_timeout=1.0):
    send("heartbeat", **HELLO, heartbeat_s=1.0)
    if method is not None:
        channel.basic_ack(method.delivery_tag)
        header, payload = msgpack.unpackb(body)
        if header["kind"] == "fit":
            fit(header, payload)
        if header["kind"] == "evaluate":  # nothing is held out here
            none = {"num_examples": 0, "loss": 0.0, "metrics": {}}
            send("evaluation", run=header["run"], round=header["round"], **none)
        if header["kind"] == "stop":
            break
