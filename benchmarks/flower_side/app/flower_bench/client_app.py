"""The client app, of which the engine starts a process per message."""

from __future__ import annotations

import os
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.flower_side.model import Model, make

app = ClientApp()
_models: list[Model] = []  # at most one, created with the first message


def _get_model(context: Context) -> Model:
    """Return the model of this process, created once, with its own seed of the noise."""
    if not _models:
        config: dict[str, Any] = {**context.run_config, **context.node_config}
        model = make({**config, "seed": int.from_bytes(os.urandom(4), "big")})
        if not config.get("data"):
            model.num_examples = 100 + int(config["seed"])
        _models.append(model)
    return _models[0]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model."""
    model = _get_model(context)
    number = int(message.content["config"]["server-round"])
    trained = model.train(message.content["arrays"].to_numpy_ndarrays(), number)
    metrics = MetricRecord({"num-examples": model.num_examples})
    content = RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the model."""
    arrays = message.content["arrays"].to_numpy_ndarrays()
    loss, count, metrics = _get_model(context).evaluate(arrays)
    record = MetricRecord({"num-examples": count, "loss": loss, **metrics})
    return Message(content=RecordDict({"metrics": record}), reply_to=message)
