"""Server and client of Flower's direct engine: ``start_server`` and ``start_client``.

python -m benchmarks.flower_side.direct server '{"address": …, "clients": 3, "rounds": 6, …}'
python -m benchmarks.flower_side.direct client '{"address": …, "size": 10000000, "seed": 1}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import flwr
import numpy as np

from benchmarks.flower_side.model import Model, Rounds, make

_MAX_BYTES = 2**31 - 1  # the largest limit of a gRPC message


class Timed(flwr.server.strategy.FedAvg):
    """FedAvg that waits at the gate before each round and stamps its end."""

    def __init__(self, rounds: Rounds, **options: Any) -> None:
        super().__init__(**options)
        self.rounds, self.latest = rounds, None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """Wait at the gate, then begin the round."""
        self.rounds.begin()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Average, then stamp the end of the round."""
        if failures:
            raise RuntimeError(f"a client has failed: {failures[0]}")
        averaged = super().aggregate_fit(server_round, results, failures)
        self.latest = averaged[0]
        self.rounds.committed(time.monotonic())
        return averaged


class Client(flwr.client.NumPyClient):
    """A client that trains a model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def fit(self, parameters: Any, config: Any) -> Any:
        """Train the model."""
        trained = self.model.train(parameters, int(config.get("round", 1)))
        return trained, self.model.num_examples, {}

    def evaluate(self, parameters: Any, config: Any) -> Any:
        """Evaluate the model."""
        return self.model.evaluate(parameters)


def serve(config: dict[str, Any]) -> None:
    """Run the server, then save the model if ``out`` is set."""
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

    clients, learns = config["clients"], bool(config.get("data"))
    evaluates = learns or config.get("evaluates")
    strategy = Timed(
        Rounds(config.get("gate"), config["stamps"]),
        fraction_fit=1.0,
        fraction_evaluate=1.0 if evaluates else 0.0,
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        on_fit_config_fn=lambda number: {"round": number},
        # As in fluffle, a client makes the first weights.
        initial_parameters=None if learns else ndarrays_to_parameters(make(config).first()),
    )
    flwr.server.start_server(
        server_address=config["address"],
        config=flwr.server.ServerConfig(num_rounds=config["rounds"]),
        strategy=strategy,
        grpc_max_message_length=_MAX_BYTES,
    )
    if "out" in config:
        with Path(config["out"]).open("wb") as file:
            np.savez(file, *parameters_to_ndarrays(strategy.latest))


class LettersClient(Client):
    """A client that can make the first weights."""

    def get_parameters(self, config: Any) -> Any:
        """Return the first weights."""
        return self.model.first()


def main() -> None:
    """Run the role that the command line names."""
    role, config = sys.argv[1], json.loads(sys.argv[2])
    if role == "server":
        serve(config)
    else:
        flwr.client.start_client(
            server_address=config["address"],
            client=LettersClient(make(config)).to_client(),
            grpc_max_message_length=_MAX_BYTES,
        )


if __name__ == "__main__":
    main()
