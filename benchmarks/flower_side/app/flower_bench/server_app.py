"""The server app: Flower's FedAvg, with a gate before each round and a time stamp after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.flower_side.model import Rounds, make

app = ServerApp()
_DAY_S = 86400.0


class Timed(FedAvg):
    """FedAvg that waits at the gate before each round and stamps its end."""

    rounds: Rounds

    def configure_train(self, server_round: int, *args: Any, **named: Any) -> Any:
        """Wait at the gate, then begin the round."""
        self.rounds.begin()
        return super().configure_train(server_round, *args, **named)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Average, then stamp the end of the round."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client has failed: {reply.error.reason}")
        averaged = super().aggregate_train(server_round, replies)
        self.rounds.committed(time.monotonic())
        return averaged


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds and save the model if ``out`` is set."""
    config = dict(context.run_config)
    clients, evaluates = int(config["clients"]), bool(config["data"] or config["evaluates"])
    strategy = Timed(
        fraction_train=1.0,
        fraction_evaluate=1.0 if evaluates else 0.0,
        min_train_nodes=clients,
        min_evaluate_nodes=clients,
        min_available_nodes=clients,
    )
    strategy.rounds = Rounds(str(config["gate"]), str(config["stamps"]))
    first = make(config).first()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(first),
        num_rounds=int(config["rounds"]),
        timeout=_DAY_S,
    )
    if config["out"]:
        with Path(str(config["out"])).open("wb") as file:
            np.savez(file, *result.arrays.to_numpy_ndarrays())
