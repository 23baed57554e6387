"""Flower's FedAvg as both kinds of rounds are measured: in processes, and simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.serverapp.strategy import FedAvg


class Timed(FedAvg):
    """FedAvg that reports when each round was averaged, and stops if a client has failed.

    Args:
        averaged: called after each round's average.
        options: the options of FedAvg.
    """

    def __init__(self, averaged: Callable[[], object], **options: Any) -> None:
        super().__init__(**options)
        self._averaged = averaged

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Average, then report it."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client has failed: {reply.error.reason}")
        averaged = super().aggregate_train(server_round, replies)
        self._averaged()
        return averaged
