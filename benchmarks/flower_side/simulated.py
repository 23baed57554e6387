"""Server app and client app of a simulated job, with the tasks of fluffle's workers.

Flower runs the client app in several processes. Each makes the job's data once, and keeps the tasks
of the clients that it has played.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.flower_side.strategy import Timed
from benchmarks.simulated_jobs import JOBS
from fluffle_common.protocol.messages import Plan

_DAY_S = 86400.0
client = ClientApp()


@functools.cache
def _tasks(name: str) -> Any:
    return JOBS[name].tasks()


@functools.cache
def _task(name: str, number: int) -> Any:
    """Return a client's task; the examples are random, so that any equal parts will do."""
    tasks = _tasks(name)
    if isinstance(tasks, list):
        return tasks[number]
    each = tasks.num_examples // JOBS[name].clients
    return tasks.part(np.arange(number * each, (number + 1) * each), number)


@functools.cache
def _names(name: str) -> list[str]:
    """Return the names of the model's tensors, in the order in which they travel."""
    return list(_task(name, 0).init(0))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that the message brings."""
    config = message.content["config"]
    name = str(config["job"])
    arrays = message.content["arrays"].to_numpy_ndarrays()
    plan = Plan(batch_size=JOBS[name].batch_size, seed=int(config["server-round"]))
    task = _task(name, int(context.node_config["partition-id"]))
    trained = task.train(dict(zip(_names(name), arrays, strict=True)), plan, lambda *_: None)
    content = RecordDict({
        "arrays": ArrayRecord([trained.weights[tensor] for tensor in _names(name)]),
        "metrics": MetricRecord({"num-examples": trained.num_examples, **trained.metrics}),
    })  # fmt: skip
    return Message(content=content, reply_to=message)


def server(name: str, rounds: int, averaged: list[float]) -> ServerApp:
    """Return a server app that appends the time of each round's average to ``averaged``."""
    app, job = ServerApp(), JOBS[name]

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        tasks = _tasks(name)
        first = _task(name, 0).init(0)

        def test(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            if number == 0 or (number % job.test_every and number != rounds):
                return None
            weights = dict(zip(first, arrays.to_numpy_ndarrays(), strict=True))
            found = tasks.evaluate(weights)
            return MetricRecord({"loss": found.loss, **found.metrics})

        strategy = Timed(
            lambda: averaged.append(time.perf_counter()),
            fraction_train=job.fraction,
            fraction_evaluate=0.0,
            min_train_nodes=job.cohort,
            min_available_nodes=job.clients,
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(list(first.values())),
            num_rounds=rounds,
            timeout=_DAY_S,
            train_config=ConfigRecord({"job": name}),
            evaluate_fn=None if isinstance(tasks, list) else test,
        )

    return app
