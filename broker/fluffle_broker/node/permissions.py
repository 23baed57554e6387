"""The least that RabbitMQ must allow a worker's user, and the coordinator's: see docs/rights.md."""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fluffle_common.errors import BrokerError
from fluffle_common.protocol.topology import Exchange, Queue, Topology, lock_of

NOTHING = "^$"
_LINE = 77  # signs, before the backslash of a line that goes on
# To publish to a queue by its name, and to send there what a queue gives up, takes write on this.
_DEFAULT_EXCHANGE = "amq.default"
_REPLACED = re.compile(r"[^A-Za-z0-9_-]")

Run = Callable[[Sequence[str], str | None], str]


@dataclass(frozen=True)
class Rights:
    """What one user may do in a vhost: regular expressions, as RabbitMQ wants them.

    Args:
        user: whose.
        configure: what it may declare and delete.
        write: what it may publish to and, of queues, bind.
        read: what it may consume, get and purge and, of exchanges, bind to.
        topics: the routing keys that it may publish under, by topic exchange.
    """

    user: str
    configure: str
    write: str
    read: str
    topics: dict[str, str] = field(default_factory=dict)

    def commands(self, vhost: str) -> list[list[str]]:
        """Return the arguments of ``rabbitmqctl`` that grant just this, in their order."""
        at = ["--vhost", vhost, self.user]
        return [
            ["set_permissions", *at, self.configure, self.write, self.read],
            *(
                ["set_topic_permissions", *at, exchange, keys, NOTHING]
                for exchange, keys in self.topics.items()
            ),
        ]


def worker_rights(topology: Topology, worker: str) -> Rights:
    """Return what a worker needs; its user is named like its id, for ``--verify-users``.

    Example:
        >>> worker_rights(Topology("letters"), "site.7").configure
        '^letters\\\\.(inbox\\\\.site\\\\.7|outbox\\\\.site\\\\.7)$'
    """
    own = [queue.name for queue in topology.queues_of(worker)]
    locks = [lock_of(topology.inbox(worker))] if topology.queue_type == "quorum" else []
    return Rights(
        user=worker,
        configure=_one_of([*own, *locks]),
        write=_one_of([topology.results]),
        read=_one_of(own),
        topics={topology.results: f"^[a-z_]+\\.{_literal(worker)}$"},
    )


def coordinator_rights(topology: Topology, user: str) -> Rights:
    """Return what the coordinator needs: all that is the federation's, and nothing else.

    It declares what is shared, not what is a worker's own.
    """
    shared = [one.name for one in topology.shared() if isinstance(one, Exchange | Queue)]
    locks = [lock_of(topology.presence)] if topology.queue_type == "quorum" else []
    everything = f"{_literal(topology.federation)}\\..+"
    return Rights(
        user=user,
        configure=_one_of([*dict.fromkeys(shared), *locks]),
        write=f"^({everything}|{_literal(_DEFAULT_EXCHANGE)})$",
        read=f"^{everything}$",
    )


def shell_lines(rights: Rights, vhost: str) -> list[str]:
    """Write out what to type where the broker runs, in lines that fit a terminal."""
    lines = [f"# if there is no user {rights.user} yet; asks for a password"]
    for command in (["add_user", rights.user], *rights.commands(vhost)):
        lines.append("rabbitmqctl")
        for word in map(shlex.quote, command):
            if len(lines[-1]) + len(word) < _LINE:
                lines[-1] += f" {word}"
            else:
                lines[-1] += " \\"
                lines.append(f"  {word}")
    return lines


def apply(rights: Rights, vhost: str, run: Run, password: str | None = None) -> str | None:
    """Grant it on a broker; a user that is not there is made.

    Args:
        rights: what to grant; it replaces what the user could do in the vhost.
        vhost: where.
        run: runs ``rabbitmqctl`` with arguments and a standard input; returns what it prints.
        password: of the user, if it is made or to be changed; None makes one up where it is made.

    Returns:
        The password that was made up; None where none was.

    Raises:
        BrokerError: where ``rabbitmqctl`` fails.
    """
    listed = run(["list_users", "--silent"], None).splitlines()
    made_up = None
    if rights.user not in (line.partition("\t")[0] for line in listed):
        made_up = None if password else secrets.token_urlsafe(24)
        # By standard input: what is on a command line, all of the machine can see.
        run(["add_user", rights.user], f"{password or made_up}\n")
    elif password:
        run(["change_password", rights.user], f"{password}\n")
    for command in rights.commands(vhost):
        run(command, None)
    return made_up


def runner(rabbitmqctl: Sequence[str]) -> Run:
    """Return what runs a ``rabbitmqctl``."""

    def run(arguments: Sequence[str], text: str | None) -> str:
        try:
            done = subprocess.run(
                [*rabbitmqctl, *arguments], input=text or "", capture_output=True, text=True,
                check=False,
            )  # fmt: skip
        except OSError as wrong:
            raise BrokerError(f"cannot run {rabbitmqctl[0]}: {wrong.strerror}") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "it gives no reason").splitlines()
            raise BrokerError(f"rabbitmqctl {arguments[0]} failed: {said[-1]}")
        return done.stdout

    return run


def _one_of(names: Sequence[str]) -> str:
    """Return a pattern that matches just these names; what they begin with stands there once."""
    if len(names) == 1:
        return f"^{_literal(names[0])}$"
    first = f"{names[0].partition('.')[0]}."
    common = first if all(name.startswith(first) for name in names) else ""
    rest = "|".join(_literal(name.removeprefix(common)) for name in names)
    return f"^{_literal(common)}({rest})$"


def _literal(name: str) -> str:
    """Write a name so that each of its characters stands for itself."""
    return _REPLACED.sub(lambda char: "\\" + char[0], name)
