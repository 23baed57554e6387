"""Messages saved as files: the body as it was sent, and a description as JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

from fluffle_broker.inspect.decode import DecodedMessage, part_of
from fluffle_common.durable_files import replacing
from fluffle_common.errors import UsageError


class MessageArchive:
    """A folder of saved messages, whose file names sort in the order of arrival.

    The files of a message are ``20260131T120000-000012-update-w1-round-7.msgpack`` and the same
    with ``.json``.

    Args:
        path: the folder; created if it is missing.

    Raises:
        UsageError: if it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        with _errors(path):
            path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._numbers = itertools.count(1)
        self._latest = ""  # the clock may be set back, as local time is each autumn

    def save(self, decoded: DecodedMessage, now: float) -> Path:
        """Write both files atomically, and return the body's; raise ``UsageError`` on failure."""
        arrived = time.strftime("%Y%m%dT%H%M%S", time.localtime(now))
        self._latest = max(self._latest, arrived)
        body = self._path / f"{self._latest}-{next(self._numbers):06d}-{_name(decoded)}.msgpack"
        with _errors(self._path):
            with replacing(body) as file:
                file.write(decoded.delivery.body)
            with replacing(body.with_name(f"{body.stem}.json")) as file:
                file.write(json.dumps(decoded.as_dict(now), indent=2).encode() + b"\n")
        return body


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as no:
        raise UsageError(
            f"cannot save messages in {path} ({no}); choose another folder with --save"
        ) from None


def _name(decoded: DecodedMessage) -> str:
    """Return the descriptive part of the file name; headers of an invalid body are not trusted."""
    message = decoded.message
    if message is None:
        return "unreadable"
    words = [message.kind, getattr(message, "worker", None)]
    if getattr(message, "round", None) is not None:
        words.append(f"round-{decoded.round}")
    part = part_of(decoded)
    if part is not None:
        words.append(f"{part[0]:04d}")
    return "-".join(filter(None, words))
