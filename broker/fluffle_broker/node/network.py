"""Probing TCP ports, AMQP brokers and epmd, as far as starting and stopping a node needs it."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct

from fluffle_broker.node import processes
from fluffle_common.errors import BrokerError

LOOPBACK = "127.0.0.1"

# Below the ports that the system hands out, of which another program could get one before a node
# listens on it, which takes seconds.
_OURS = range(20_000, 32_768)

_TIMEOUT_S = 2.0

_AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
_METHOD_FRAME = 1
_CONNECTION_START = b"\x00\x0a\x00\x0a"  # class 10, method 10

_EPMD_NAMES = b"\x00\x01n"
_EPMD_KILL = b"\x00\x01k"


def free_ports(count: int) -> list[int]:
    """Return different free ports, chosen at random; each stays bound until all are chosen."""
    with contextlib.ExitStack() as held:

        def is_free(port: int) -> bool:
            with contextlib.suppress(OSError):
                held.enter_context(socket.socket()).bind((LOOPBACK, port))
                return True
            return False

        # Not the shared generator, which several processes may have seeded alike.
        some = random.SystemRandom().sample(_OURS, len(_OURS))
        return list(itertools.islice(filter(is_free, some), count))


def require_free(port: int, what: str, option: str) -> None:
    """Raise a `BrokerError` that names the process on a port, unless the port is free."""
    with socket.socket() as probe:
        # As the Erlang VM does, so that closed connections of a killed node do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as why:
            holder = processes.listener(port)
            by = f" by {holder}" if holder else ""
            raise BrokerError(
                f"{what} port {port} cannot be used ({why.strerror}{by}); choose another port with "
                f"{option} (--port 0 chooses free ports)"
            ) from None


def answers(port: int) -> bool:
    """Return whether something accepts connections on a port."""
    try:
        with socket.create_connection((LOOPBACK, port), _TIMEOUT_S):
            return True
    except OSError:
        return False


def amqp_version(port: int) -> str | None:
    """Return the version in an AMQP 0-9-1 handshake, perhaps ""; None if no broker answers."""
    try:
        with (
            socket.create_connection((LOOPBACK, port), _TIMEOUT_S) as link,
            link.makefile("rb") as stream,
        ):
            link.sendall(_AMQP_HEADER)
            kind, _channel, size = struct.unpack(">BHI", stream.read(7))
            payload = stream.read(min(size, 65536))
    except (OSError, struct.error):  # struct.error if the connection closes early
        return None
    if kind != _METHOD_FRAME or not payload.startswith(_CONNECTION_START):
        return None
    # The server properties are an AMQP table: a short-string key, 'S', a long string.
    _, _, rest = payload.partition(b"\x07versionS")
    return rest[4 : 4 + int.from_bytes(rest[:4])].decode(errors="replace")


# RabbitMQ starts epmd by running a short-lived node with this name and a number.
_EPMD_STARTER = "epmd-starter-"


def epmd_nodes(port: int) -> list[str] | None:
    """Return the Erlang nodes that an epmd knows, or None if no epmd answers."""
    reply = _ask_epmd(port, _EPMD_NAMES)
    # Four bytes with the port, then a line like "name fluffle at port 25673" for each node.
    if reply is None or reply[:4] != struct.pack(">I", port):
        return None
    return [
        line.split()[1]
        for line in reply[4:].decode(errors="replace").splitlines()
        if line.startswith("name ")
    ]


def stop_epmd(port: int, node: str) -> bool:
    """Stop an epmd that serves at most ``node``, which has ended; return whether it is gone."""

    def gone_or_shared() -> bool:
        names = epmd_nodes(port)
        if names is None:
            return not answers(port)  # on a busy machine, it may list them later
        if not names:
            _ask_epmd(port, _EPMD_KILL)
            return not answers(port)
        # epmd needs a moment to notice that a killed node is gone. A booting node has a longer
        # name, and before that, the node that started epmd is registered.
        return not any(f"{name}_".startswith((f"{node}_", _EPMD_STARTER)) for name in names)

    processes.wait_until(gone_or_shared, timeout_s=10)
    return not answers(port)


def _ask_epmd(port: int, request: bytes) -> bytes | None:
    try:
        with socket.create_connection((LOOPBACK, port), _TIMEOUT_S) as link:
            link.sendall(request)
            with link.makefile("rb") as stream:
                return stream.read()
    except OSError:
        return None
