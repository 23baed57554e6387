"""``fluffle worker`` with a durable record of its publishes and the broker's confirms.

    FAULTS_SENT=folder python tests/faults/logged_worker.py worker --federation ...

It wraps the one method through which all messages leave. Before a message is published, its body is
in ``<sha256>.msgpack`` and a line in ``<pid>.jsonl``, both fsynced; another line follows after the
confirm, or if the outcome is unknown. Signs of life are not recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluffle_common.cli.app import main
from fluffle_common.transport.base import Properties
from fluffle_common.transport.rabbitmq.link import AmqpLink

_SIGNS_OF_LIFE = ("hello", "heartbeat", "bye")


class Record:
    """The record of a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = (folder / f"{os.getpid()}.jsonl").open("ab", buffering=0)
        self._attempts = 0

    def begin(self, body: bytes, properties: Properties) -> dict[str, Any]:
        """Record that a message is about to be published."""
        name = hashlib.sha256(body).hexdigest()
        path = self._folder / f"{name}.msgpack"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            with partial.open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        self._attempts += 1
        attempt = {
            "attempt": f"{os.getpid()}/{self._attempts}",
            "type": properties.type,
            "message_id": properties.message_id,
            "sha256": name,
        }
        self.note("began", attempt)
        return attempt

    def note(self, event: str, attempt: dict[str, Any]) -> None:
        """Write a line and fsync it."""
        line = {"event": event, "at": time.monotonic(), **attempt}
        self._lines.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._lines.fileno())


def wrap(record: Record) -> None:
    """Record every publish of the transport."""
    publish = AmqpLink.publish

    async def recorded(
        self: AmqpLink,
        body: bytes,
        properties: Properties,
        *,
        exchange: str,
        keys: Sequence[str],
        urgent: bool = False,
    ) -> None:
        where: dict[str, Any] = {"exchange": exchange, "keys": keys, "urgent": urgent}
        if properties.type in _SIGNS_OF_LIFE:
            await publish(self, body, properties, **where)
            return
        attempt = record.begin(body, properties)
        try:
            await publish(self, body, properties, **where)
        except BaseException:
            record.note("unknown", attempt)
            raise
        record.note("confirmed", attempt)

    AmqpLink.publish = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    wrap(Record(Path(os.environ["FAULTS_SENT"])))
    main()
