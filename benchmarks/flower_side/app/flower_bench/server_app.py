"""The server's app: FedAvg as it comes, that waits at the gate and tells when it has averaged."""

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
    """See above."""

    rounds: Rounds

    def configure_train(self, server_round: int, *args: Any, **named: Any) -> Any:
        """Begin a round."""
        self.rounds.begin()
        return super().configure_train(server_round, *args, **named)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """End a round."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client has failed: {reply.error.reason}")
        averaged = super().aggregate_train(server_round, replies)
        self.rounds.committed(time.monotonic())
        return averaged


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds, and save the model where told."""
    told = dict(context.run_config)
    clients, evaluates = int(told["clients"]), bool(told["data"] or told["evaluates"])
    strategy = Timed(
        fraction_train=1.0,
        fraction_evaluate=1.0 if evaluates else 0.0,
        min_train_nodes=clients,
        min_evaluate_nodes=clients,
        min_available_nodes=clients,
    )
    strategy.rounds = Rounds(str(told["gate"]), str(told["stamps"]))
    first = make(told).first()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(first),
        num_rounds=int(told["rounds"]),
        timeout=_DAY_S,
    )
    if told["out"]:
        with Path(str(told["out"])).open("wb") as file:
            np.savez(file, *result.arrays.to_numpy_ndarrays())
