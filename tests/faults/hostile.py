"""Generates invalid messages, seeded, each with a name, and without fluffle's code.

Each must end in the rejected queue, so none may happen to be valid: neither AMQP nor the protocol
could distinguish a well-formed lie from the truth.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

Header = dict[str, Any]
_ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class Hostile:
    """A message for a queue; ``rejected`` says whether it must end in the rejected queue."""

    queue: str
    what: str
    body: bytes
    rejected: bool = True
    message_id: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Foe:
    """Generates invalid messages for a federation.

    Args:
        rng: makes all random choices.
        federation: the name of the federation.
        workers: the names of its workers.
        run: the id of its run.
    """

    def __init__(
        self, rng: random.Random, federation: str, workers: list[str], run: str = "r"
    ) -> None:
        self.rng, self.federation, self.workers, self.run = rng, federation, workers, run

    def queues(self) -> list[str]:
        """Return the queues that fluffle always consumes; an outbox is read only on demand."""
        return [
            f"{self.federation}.updates",
            f"{self.federation}.presence",
            *(f"{self.federation}.inbox.{worker}" for worker in self.workers),
        ]

    def some(self, count: int, queues: list[str] | None = None) -> list[Hostile]:
        """Return messages for all queues in turn."""
        names = queues or self.queues()
        return [self.one(names[number % len(names)]) for number in range(count)]

    def one(self, queue: str) -> Hostile:
        """Return a message for a queue."""
        makers: list[Callable[[str], tuple[str, bytes]]] = [self._noise]
        kind = queue.removeprefix(f"{self.federation}.").partition(".")[0]
        if kind != "outbox":  # a part of an unknown transfer is ignored
            makers += [self._mutant, self._wrong, self._misplaced]
        what, body = self.rng.choice(makers)(kind)
        return Hostile(queue, what, body)

    # --- bytes that are no message -------------------------------------------------------------

    def _noise(self, _: str) -> tuple[str, bytes]:
        rng = self.rng
        kinds: dict[str, Callable[[], bytes]] = {
            "nothing": lambda: b"",
            "random bytes": lambda: rng.randbytes(rng.randint(1, 2000)),
            "an array of two, then random bytes": lambda: b"\x92" + rng.randbytes(300),
            "JSON": lambda: b'{"kind": "update"}',
            "a deep nest": lambda: b"\x92" + b"\x91" * rng.randint(600, 90_000),
            "a claim of 4 GiB": lambda: b"\x92\x80\xc6\xff\xff\xff\xff",
            "a map of 4 billion": lambda: b"\x92\xdf\xff\xff\xff\xff",
            "a text of 4 GiB": lambda: b"\x92\x81\xdb\xff\xff\xff\xff",
            "an extension type": lambda: b"\x92\xc7\x04\x05aaaa\xc4\x00",
            "text that is no UTF-8": lambda: b"\x92\x81\xa2\xff\xfe\x01\xc4\x00",
            "a header that is a list": lambda: msgpack.packb([[1, 2], b""]),
            "an empty header": lambda: msgpack.packb([{}, b""]),
            "three things": lambda: msgpack.packb([{"kind": "update"}, b"", b""]),
            "no payload": lambda: b"\x91" + msgpack.packb({"kind": "update"}),
        }
        what = rng.choice(list(kinds))
        return what, kinds[what]()

    # --- valid messages of another federation, damaged at random --------------------------------

    def _mutant(self, kind: str) -> tuple[str, bytes]:
        """Damage a message of another federation in one to five places."""
        header, payload = self._sound(kind)
        header["federation"] = _ELSEWHERE
        body = bytearray(msgpack.packb([header, payload]))
        damages = []
        for _ in range(self.rng.randint(1, 5)):
            at = self.rng.randrange(len(body) + 1)
            what = self.rng.choice(("flip", "set", "cut", "insert", "repeat"))
            damages.append(f"{what} at {at}")
            if what == "flip":
                body[at : at + 1] = bytes(b ^ 1 << self.rng.randrange(8) for b in body[at : at + 1])
            elif what == "set":
                body[at : at + 1] = self.rng.randbytes(1)
            elif what == "cut":
                del body[at : at + self.rng.randint(1, 40)]
            elif what == "insert":
                body[at:at] = self.rng.randbytes(self.rng.randint(1, 8))
            else:
                body[at:at] = body[at : at + 20]
        return f"damaged {header['kind']}: {', '.join(damages)}", bytes(body)

    # --- messages of this federation with one error ---------------------------------------------

    def _misplaced(self, kind: str) -> tuple[str, bytes]:
        others = {"updates": "inbox", "inbox": "presence", "presence": "updates"}
        header, payload = self._sound(others[kind])
        return f"{header['kind']} in the wrong queue", msgpack.packb([header, payload])

    def _wrong(self, kind: str) -> tuple[str, bytes]:
        header, payload = self._sound(kind)
        changes = list(self._changes(kind))
        what, change = self.rng.choice(changes)
        header |= change
        if what == "NaN":
            payload = np.full(256, np.nan, np.float32).tobytes() + payload[1024:]
        if what == "a field is missing":
            needed = [key for key in ("protocol", "federation", "kind", "base") if key in header]
            del header[self.rng.choice(needed)]
            # A missing protocol means the only existing one.
            header["protocol"] = 7 if "protocol" not in header else header["protocol"]
        return f"{header.get('kind')}: {what}", msgpack.packb([header, payload])

    def _changes(self, kind: str) -> Iterator[tuple[str, Header]]:
        yield "another protocol", {"protocol": 1}
        yield "of another federation", {"federation": _ELSEWHERE}
        yield "an unknown kind", {"kind": "exploit"}
        yield "a kind that is a number", {"kind": 3}
        yield "an unknown field that is critical", {"admin": True, "critical": ["admin"]}
        yield "a field is missing", {}
        yield "a base that is a number", {"base": 7}
        yield "a base without a name", {"base": ""}
        yield "a long base", {"base": "b" * 65}
        if kind == "updates":
            yield "of another run", {"run": "another"}
            yield "of a round far away", {"round": 10**8}
            yield "no examples", {"num_examples": 0}
            yield "negative examples", {"num_examples": -5}
            yield "too many examples", {"num_examples": 10**18}
            yield "examples that are text", {"num_examples": "50"}
            yield "endless seconds", {"seconds": math.inf}
            yield "of another run, NaN", {"run": "another", "metrics": {"loss": math.nan}}
            yield "a worker with a bad name", {"worker": "a b*#"}
        if kind == "presence":
            yield "no examples", {"num_examples": 0}
            yield "no heartbeat", {"heartbeat_s": 0.0}
            yield "a heartbeat a year", {"heartbeat_s": 3e7}
            yield "an unknown state", {"state": "dreaming"}
            yield "a bad name", {"worker": "../w0"}
            yield "a long name", {"worker": "w" * 500}
            yield "an endless loss", {"loss": math.inf}
        if kind == "inbox":
            yield "NaN", {}
            yield "a tensor beyond the payload", {"tensors": _table(offset=10**6)}
            yield "a shape that does not go with the bytes", {"tensors": _table(shape=[10**9])}
            yield "an unknown dtype", {"tensors": _table(dtype="object")}
            yield "round 0", {"round": 0}
            yield "a seed that is text", {"plan": {"seed": "7"}}

    def _sound(self, kind: str) -> tuple[Header, bytes]:
        """Return a message for a kind of queue that is valid except that its worker is unknown."""
        header: Header = {"protocol": 2, "federation": self.federation}
        if kind == "presence":
            return header | {
                "kind": self.rng.choice(("hello", "heartbeat")),
                "worker": "mallory",
                "session": "s",
                "num_examples": 50,
                "task": "t",
                "heartbeat_s": 1.0,
            }, b""
        payload = self.rng.randbytes(1024)
        while not np.isfinite(np.frombuffer(payload, np.float32)).all():
            payload = self.rng.randbytes(1024)
        if kind == "updates":
            return header | {
                "kind": "update",
                "run": self.run,
                "round": 1,
                "base": "b",
                "worker": "mallory",
                "num_examples": 50,
                "seconds": 0.5,
                "tensors": _table(),
            }, payload
        return header | {
            "kind": "fit",
            "run": "another",
            "round": 1,
            "base": "b",
            "evaluate": True,
            "plan": {"seed": 1},
            "tensors": _table(),
        }, payload


def _table(**changes: Any) -> list[Header]:
    entry = {"name": "w", "dtype": "float32", "shape": [256], "offset": 0, "nbytes": 1024}
    return [entry | changes]
