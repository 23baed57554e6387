"""A gate in the training of every worker, so that rounds go on only while they are measured.

Every worker asks its gate before it trains. While the gate is shut, all workers stand there with
the next round's weights in their hands: nothing is on its way anywhere, and others can be measured
undisturbed. ``release(n)`` lets each of them train n times, without another word in between.

Only the standard library, since the workers of other systems use it too.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

_LOOK_S = 1.0
_COUNT_BYTES = 4
_AT_THE_GATE = b"."


class Gate:
    """A worker's end.

    Args:
        path: the socket of the ``Gates``.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._left = 0

    def enter(self) -> None:
        """Return when this worker may train once more.

        Raises:
            ConnectionError: where the benchmark is over.
        """
        if not self._left:
            self._socket.sendall(_AT_THE_GATE)
            told = self._socket.recv(_COUNT_BYTES, socket.MSG_WAITALL)
            if len(told) < _COUNT_BYTES:
                raise ConnectionError("the benchmark is over")
            self._left = int.from_bytes(told, "big")
        self._left -= 1

    def close(self) -> None:
        """Leave."""
        self._socket.close()


class Gates:
    """The benchmark's end of all the gates.

    Args:
        path: where to make the socket.
        workers: how many will come.
        check: called now and then while waiting; raises where waiting has become pointless.
    """

    def __init__(self, path: Path, workers: int, check: Callable[[], None]) -> None:
        self.path, self._workers, self._check = path, workers, check
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(workers)
        self._listener.settimeout(_LOOK_S)
        self._connected: list[socket.socket] = []

    def wait(self) -> None:
        """Return when every worker stands at its gate."""
        while len(self._connected) < self._workers:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(_LOOK_S)
                self._connected.append(connection)
            self._check()
        for connection in self._connected:
            while not self._stands(connection):
                self._check()

    def _stands(self, connection: socket.socket) -> bool:
        try:
            if not connection.recv(1):
                time.sleep(_LOOK_S)  # its end may tell more
                self._check()
                raise ConnectionError("a worker has left the benchmark")
        except TimeoutError:
            return False
        return True

    def release(self, times: int) -> None:
        """Let every worker train that many times, and then wait at the gate again."""
        for connection in self._connected:
            connection.sendall(times.to_bytes(_COUNT_BYTES, "big"))

    def close(self) -> None:
        """Send everyone home."""
        for each in (self._listener, *self._connected):
            each.close()
