"""A worker written from docs/protocol.md alone: python pika_worker.py URL FEDERATION WORKER."""

import sys
import time

import msgpack
import numpy as np
import pika

URL, F, W = sys.argv[1:]
HELLO = {"num_examples": 50, "task": "pika", "heartbeat_s": 1.0, "session": str(time.time())}
x = np.random.default_rng(7).normal(size=(60, 3))
y = x @ [2.0, -3.0, 0.5] + 4.0  # the last ten examples are held out
channel = pika.BlockingConnection(pika.URLParameters(URL)).channel()
channel.confirm_delivery()
for name in ("inbox", "outbox"):
    how = {"x-queue-type": "classic", "x-expires": 1800000}
    channel.queue_declare(f"{F}.{name}.{W}", durable=True, arguments=how)


def send(kind, ids=(), tensors=(), **fields):
    table, payload = [], b""
    for name, array in dict(tensors).items():
        payload += bytes(-len(payload) % 64)
        entry = name, str(array.dtype), array.shape, len(payload), array.nbytes
        table.append(dict(zip(("name", "dtype", "shape", "offset", "nbytes"), entry, strict=True)))
        payload += array.tobytes()
    header = {"protocol": 2, "federation": F, "kind": kind, "worker": W, **dict(ids), **fields}
    body = msgpack.packb([{**header, "tensors": table} if table else header, payload])
    name = f"{kind} {ids} {W}"
    told = pika.BasicProperties("application/msgpack", type=kind, message_id=name, delivery_mode=2)
    channel.basic_publish(f"{F}.results", f"{kind}.{W}", body, told, mandatory=True)


send("hello", **HELLO)
for method, _, body in channel.consume(f"{F}.inbox.{W}", exclusive=True, inactivity_timeout=1.0):
    send("heartbeat", **HELLO)
    if method is None:
        continue
    channel.basic_ack(method.delivery_tag)
    try:
        header, payload = msgpack.unpackb(body)
    except ValueError:
        continue
    began = time.perf_counter()
    kind, ids = header["kind"], {k: header[k] for k in ("run", "round", "base") if k in header}
    if table := header.get("tensors"):
        flat = [np.frombuffer(payload[t["offset"] :][: t["nbytes"]], t["dtype"]) for t in table]
        w = {t["name"]: part.reshape(t["shape"]) for t, part in zip(table, flat, strict=True)}
        error = x @ w["slopes"] + w["intercept"] - y
    if kind in ("refusal", "stop"):
        break
    if kind == "init_request":
        send("first_weights", ids, {"slopes": np.zeros(3), "intercept": np.zeros(())})
    if kind == "evaluate" or (kind == "fit" and header["evaluate"]):
        told = {"num_examples": 10, "loss": float(np.mean(error[50:] ** 2))}
        send("evaluation", {**ids, "round": ids["round"] - (kind == "fit")}, **told)
    if kind == "fit":
        delta = {"slopes": -0.1 * x[:50].T @ error[:50] / 50, "intercept": -0.1 * error[:50].mean()}
        send("update", ids, delta, num_examples=50, seconds=time.perf_counter() - began)
send("bye", session=HELLO["session"], reason="the run has ended")
