"""The little of three protocols that starting and stopping a node takes: TCP ports, AMQP, epmd."""

from __future__ import annotations

import contextlib
import socket
import struct

from fluffle_broker.node import processes
from fluffle_common.errors import BrokerError

LOOPBACK = "127.0.0.1"

_AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
_METHOD_FRAME = 1
_CONNECTION_START = b"\x00\x0a\x00\x0a"  # class 10, method 10

_EPMD_NAMES = b"\x00\x01n"
_EPMD_KILL = b"\x00\x01k"


def free_ports(count: int) -> list[int]:
    """Choose ports that nobody listens on; all different, as all are held until all are chosen."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]


def require_free(port: int, what: str, option: str) -> None:
    """Raise a `BrokerError` that names the port and who has it, unless the port can be had."""
    with socket.socket() as probe:
        # As the Erlang VM does: the closed connections of a node that was killed do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise BrokerError(
                f"{what} port {port} needs root; give a port above 1023 with {option}"
            ) from None
        except OSError:
            holder = processes.listener(port)
            by = f" by {holder}" if holder else ""
            raise BrokerError(
                f"{what} port {port} is already taken{by}; give another one with {option} "
                "(--port 0 chooses free ones)"
            ) from None


def answers(port: int, *, timeout_s: float = 2) -> bool:
    """Tell whether something accepts connections on a port."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def amqp_version(port: int, *, timeout_s: float = 2) -> str | None:
    """Greet an AMQP 0-9-1 broker on a port.

    Returns:
        The version the broker tells in its Connection.Start ("" if it tells none), or None where
        no broker answers.
    """
    try:
        with socket.create_connection((LOOPBACK, port), timeout=timeout_s) as link:
            link.sendall(_AMQP_HEADER)
            kind, _channel, size = struct.unpack(">BHI", _exactly(link, 7))
            payload = _exactly(link, min(size, 65536))
    except OSError:
        return None
    if kind != _METHOD_FRAME or not payload.startswith(_CONNECTION_START):
        return None
    # The server properties are an AMQP table: a short-string key, 'S', a long string.
    _, _, rest = payload.partition(b"\x07versionS")
    return rest[4 : 4 + int.from_bytes(rest[:4])].decode(errors="replace")


# RabbitMQ starts epmd by starting, and ending at once, a node of this name and a number.
_EPMD_STARTER = "epmd-starter-"


def epmd_nodes(port: int) -> list[str] | None:
    """List the Erlang nodes an epmd knows, or return None where no epmd answers."""
    reply = _ask_epmd(port, _EPMD_NAMES)
    # Four bytes that repeat the port, then a line "name fluffle at port 25673" for each node.
    if reply is None or reply[:4] != struct.pack(">I", port):
        return None
    return [
        line.split()[1]
        for line in reply[4:].decode(errors="replace").splitlines()
        if line.startswith("name ")
    ]


def stop_epmd(port: int, node: str) -> bool:
    """End the epmd on a port, unless it serves other nodes than ``node``, which has ended.

    Returns:
        Whether no epmd is left there.
    """

    def gone_or_of_others() -> bool:
        names = epmd_nodes(port)
        if names == []:
            _ask_epmd(port, _EPMD_KILL)
            return epmd_nodes(port) is None
        # It takes epmd a moment to see that a killed node is gone. While it boots, a node is known
        # by a longer name, and before that, whoever has started epmd for it by another.
        return names is None or not any(
            f"{name}_".startswith((f"{node}_", _EPMD_STARTER)) for name in names
        )

    processes.wait_until(gone_or_of_others, timeout_s=10)
    return epmd_nodes(port) is None


def _ask_epmd(port: int, request: bytes) -> bytes | None:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=2) as link:
            link.sendall(request)
            reply = b""
            while chunk := link.recv(4096):
                reply += chunk
            return reply
    except OSError:
        return None


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = link.recv(size - len(data))
        if not chunk:
            raise ConnectionError("closed in the middle of a frame")
        data += chunk
    return data
