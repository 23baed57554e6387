"""Keeping messages as files: the body as it was sent, and beside it what is known of it."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

from fluffle_broker.inspect.decode import DecodedMessage, part_of
from fluffle_common.durable_files import replacing


class MessageArchive:
    """A folder of messages, named so that sorting by name is sorting by arrival.

    ``20260131T120000-000012-update-w1-round-7.msgpack`` and the same with ``.json``.

    Args:
        path: the folder; made where it is missing.

    Raises:
        OSError: where it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._numbers = itertools.count(1)

    def keep(self, reading: DecodedMessage, now: float) -> Path:
        """Write one message, each of its files whole or not at all; return where its body is.

        Raises:
            OSError: where the disk refuses.
        """
        began = time.strftime("%Y%m%dT%H%M%S", time.localtime(now))
        body = self._path / f"{began}-{next(self._numbers):06d}-{_name(reading)}.msgpack"
        with replacing(body) as file:
            file.write(reading.delivery.body)
        with replacing(body.with_name(f"{body.stem}.json")) as file:
            file.write(json.dumps(reading.as_dict(now), indent=2).encode() + b"\n")
        return body


def _name(reading: DecodedMessage) -> str:
    """Name a message by what it says; of one that cannot be read nothing can be trusted."""
    message = reading.message
    if message is None:
        return "unreadable"
    told = [message.kind, getattr(message, "worker", None)]
    if getattr(message, "round", None) is not None:
        told.append(f"round-{reading.round}")
    part = part_of(reading)
    if part is not None:
        told.append(f"{part[0]:04d}")
    return "-".join(filter(None, told))
