"""The client's app; the engine starts a process of it for every message."""

from __future__ import annotations

import os
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.flower_side.model import Model, make

app = ClientApp()
_made: dict[str, Model] = {}


def _model(context: Context) -> Model:
    """Return the model of this process, with noise that no other process has."""
    if "one" not in _made:
        told: dict[str, Any] = {**context.run_config, **context.node_config}
        made = make({**told, "seed": int.from_bytes(os.urandom(4), "big")})
        if not told.get("data"):
            made.num_examples = 100 + int(told["seed"])
        _made["one"] = made
    return _made["one"]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train."""
    model = _model(context)
    number = int(message.content["config"]["server-round"])
    trained = model.train(message.content["arrays"].to_numpy_ndarrays(), number)
    told = {"num-examples": model.num_examples}
    content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord(told)})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate."""
    loss, count, metrics = _model(context).evaluate(message.content["arrays"].to_numpy_ndarrays())
    told = MetricRecord({"num-examples": count, "loss": loss, **metrics})
    return Message(content=RecordDict({"metrics": told}), reply_to=message)
