"""The server app: Flower's FedAvg, with a gate before each round and a time stamp after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from benchmarks.flower_side.model import Rounds, make
from benchmarks.flower_side.strategy import Timed

app = ServerApp()
_DAY_S = 86400.0


class Gated(Timed):
    """FedAvg that waits at the gate before each round and stamps its end."""

    def __init__(self, rounds: Rounds, **options: Any) -> None:
        super().__init__(lambda: rounds.committed(time.monotonic()), **options)
        self._rounds = rounds

    def configure_train(self, server_round: int, *args: Any, **named: Any) -> Any:
        """Wait at the gate, then begin the round."""
        self._rounds.begin()
        return super().configure_train(server_round, *args, **named)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds and save the model if ``out`` is set."""
    config = dict(context.run_config)
    clients, evaluates = int(config["clients"]), bool(config["data"] or config["evaluates"])
    strategy = Gated(
        Rounds(str(config["gate"]), str(config["stamps"])),
        fraction_train=1.0,
        fraction_evaluate=1.0 if evaluates else 0.0,
        min_train_nodes=clients,
        min_evaluate_nodes=clients,
        min_available_nodes=clients,
    )
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
