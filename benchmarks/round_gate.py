"""A gate in every worker's training, so that rounds proceed only while they are measured.

Each worker enters its gate before it trains. While the gate is closed, all workers wait there with
the next round's weights and no message is under way, so that other sides can be measured
undisturbed. ``release(n)`` lets each worker train n times without further communication.

Only the standard library is imported, because the workers of other systems use this module too.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_S = 1.0
_COUNT_BYTES = 4
_ARRIVED = b"."


class Gate:
    """A worker's end of the connection.

    Args:
        path: the socket of the ``Gates``.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._left = 0

    def enter(self) -> None:
        """Block until this worker may train once more.

        Raises:
            ConnectionError: if the benchmark is over.
        """
        if not self._left:
            self._socket.sendall(_ARRIVED)
            reply = self._socket.recv(_COUNT_BYTES, socket.MSG_WAITALL)
            if len(reply) < _COUNT_BYTES:
                raise ConnectionError("the benchmark is over")
            self._left = int.from_bytes(reply, "big")
        self._left -= 1

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class Gates:
    """The benchmark's end of the connections to all workers.

    Args:
        path: the socket to create.
        workers: the number of workers to expect.
        check: called once a second while waiting; raises if waiting has become pointless.
    """

    def __init__(self, path: Path, workers: int, check: Callable[[], None]) -> None:
        self.path, self._workers, self._check = path, workers, check
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(workers)
        self._listener.settimeout(_LOOK_S)
        self._connected: list[socket.socket] = []

    def wait(self) -> None:
        """Block until every worker waits at its gate."""
        while len(self._connected) < self._workers:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(_LOOK_S)
                self._connected.append(connection)
            self._check()
        for connection in self._connected:
            while not self._has_arrived(connection):
                self._check()

    def _has_arrived(self, connection: socket.socket) -> bool:
        try:
            if not connection.recv(1):
                time.sleep(_LOOK_S)  # `check` may know why it died
                self._check()
                raise ConnectionError("a worker has left the benchmark")
        except TimeoutError:
            return False
        return True

    def release(self, times: int) -> None:
        """Let every worker train that many times before it waits at its gate again."""
        for connection in self._connected:
            connection.sendall(times.to_bytes(_COUNT_BYTES, "big"))

    def close(self) -> None:
        """Close all connections, which ends the workers."""
        for connection in (self._listener, *self._connected):
            connection.close()
