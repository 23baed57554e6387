"""The minimal RabbitMQ permissions of workers and the coordinator (see docs/permissions.md)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from fluffle_common.protocol.topology import Exchange, Queue, Topology, locks_of

NOTHING = "^$"
# Publishing to a queue by its name and dead-lettering need write access to this exchange.
_DEFAULT_EXCHANGE = "amq.default"
_REPLACED = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class Permissions:
    """The permissions of one user in a vhost, as regular expressions."""

    user: str
    configure: str  # the entities that it may declare and delete
    write: str  # the exchanges that it may publish to, and the queues that it may bind
    # The queues that it may consume from, get from and purge, and the exchanges that it may bind
    # queues to.
    read: str
    topics: dict[str, str] = field(default_factory=dict)  # routing keys, by topic exchange

    def commands(self, vhost: str) -> list[list[str]]:
        """Return the ``rabbitmqctl`` commands that grant these permissions, in order.

        The topic permissions are first, because without them, a user that may write to the exchange
        may publish under every key. RabbitMQ 4.3 refuses them while the exchange does not exist.
        """
        at = ["--vhost", vhost, self.user]
        return [
            *(
                ["set_topic_permissions", *at, exchange, keys, NOTHING]
                for exchange, keys in self.topics.items()
            ),
            ["set_permissions", *at, self.configure, self.write, self.read],
        ]


def worker_permissions(topology: Topology, worker: str) -> Permissions:
    """Return the permissions of a worker, whose user has its ID as name (``--verify-users``).

    Example:
        >>> worker_permissions(Topology("letters"), "site.7").configure
        '^letters\\\\.(inbox\\\\.site\\\\.7|outbox\\\\.site\\\\.7)$'
    """
    own = [queue.name for queue in topology.queues_of(worker)]
    locks = locks_of(topology.inbox(worker)) if topology.queue_type == "quorum" else ()
    return Permissions(
        user=worker,
        configure=_one_of([*own, *locks]),
        write=_one_of([topology.results]),
        read=_one_of(own),
        topics={topology.results: f"^[a-z_]+\\.{_literal(worker)}$"},
    )


def coordinator_permissions(topology: Topology, user: str) -> Permissions:
    """Return the permissions of the coordinator.

    It may read from and write to everything in the federation, but declare only shared entities.
    """
    shared = [one.name for one in topology.shared() if isinstance(one, Exchange | Queue)]
    locks = locks_of(topology.presence) if topology.queue_type == "quorum" else ()
    everything = f"{_literal(topology.federation)}\\..+"
    return Permissions(
        user=user,
        configure=_one_of([*dict.fromkeys(shared), *locks]),
        write=f"^({everything}|{_literal(_DEFAULT_EXCHANGE)})$",
        read=f"^{everything}$",
    )


def shell_lines(permissions: Permissions, vhost: str) -> list[str]:
    """Return the commands to run on the broker's machine: a list that stops at a failure."""
    lines = [f"# add_user asks for a password; omit its line if {permissions.user} already exists"]
    for exchange in permissions.topics:
        lines.append(f"# RabbitMQ 4.3 needs the exchange {exchange}: start the coordinator first")
    commands = [["add_user", permissions.user], *permissions.commands(vhost)]
    joined = [shlex.join(["rabbitmqctl", *command]) for command in commands]
    return [*lines, *(f"{command} &&" for command in joined[:-1]), joined[-1]]


def _one_of(names: Sequence[str]) -> str:
    """Return a pattern that matches exactly these names, with their common first part once."""
    if len(names) == 1:
        return f"^{_literal(names[0])}$"
    first = f"{names[0].partition('.')[0]}."
    common = first if all(name.startswith(first) for name in names) else ""
    rest = "|".join(_literal(name.removeprefix(common)) for name in names)
    return f"^{_literal(common)}({rest})$"


def _literal(name: str) -> str:
    """Return a pattern that matches exactly this name."""
    return _REPLACED.sub(lambda char: "\\" + char[0], name)
