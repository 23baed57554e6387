"""The permission patterns of workers and the coordinator, and how they are granted."""

from __future__ import annotations

import re
import shlex

import pytest

from fluffle_broker.node import permissions
from fluffle_common.errors import BrokerError
from fluffle_common.protocol.topology import Exchange, Queue, Topology, lock_of

TYPES = ["classic", "quorum"]


def allows(pattern: str, name: str) -> bool:
    """Match as RabbitMQ does, anywhere in the name unless the pattern is anchored."""
    return re.search(pattern, name) is not None


@pytest.mark.parametrize("queue_type", TYPES)
def test_a_worker_may_use_only_its_own_two_queues(queue_type):
    names = Topology("f", queue_type)
    mine = permissions.worker_permissions(names, "site.7")
    own = [names.inbox("site.7"), names.outbox("site.7")]
    others = [names.inbox("sitex7"), names.outbox("site.70"), names.inbox("a.site.7"), "f.evil"]
    others += [one.name for one in names.shared() if isinstance(one, Exchange | Queue)]
    for pattern in (mine.configure, mine.read):
        assert all(allows(pattern, name) for name in own)
        assert not any(allows(pattern, name) for name in others)
    lock = lock_of(names.inbox("site.7"))
    assert allows(mine.configure, lock) == (queue_type == "quorum")
    everything = [*own, *others, "amq.default", names.results]
    assert [name for name in dict.fromkeys(everything) if allows(mine.write, name)] == ["f.results"]


def test_a_worker_may_publish_only_under_its_own_keys():
    names = Topology("f")
    (keys,) = permissions.worker_permissions(names, "site.7").topics.values()
    for kind in ("hello", "first_weights", "part"):
        assert allows(keys, f"{kind}.site.7")
        assert not allows(keys, f"{kind}.sitex7")
        assert not allows(keys, f"{kind}.b.site.7")
    assert allows(keys, names.rejecting("site.7"))


@pytest.mark.parametrize("queue_type", TYPES)
def test_the_coordinator_may_do_nothing_outside_its_federation(queue_type):
    names = Topology("f", queue_type)
    its = permissions.coordinator_permissions(names, "chief")
    shared = [one.name for one in names.shared() if isinstance(one, Exchange | Queue)]
    assert all(allows(its.configure, name) for name in shared)
    assert not allows(its.configure, names.inbox("w"))
    for name in (*shared, names.inbox("w"), names.outbox("w")):  # to bind and to pull parts
        assert allows(its.write, name)
        assert allows(its.read, name)
    assert allows(its.write, "amq.default")
    for pattern in (its.configure, its.write, its.read):
        assert not allows(pattern, "g.updates")
        assert not allows(pattern, "of.updates")


class Ctl:
    """A fake rabbitmqctl."""

    def __init__(self, users: str = "guest\t[administrator]\n") -> None:
        self.users = users
        self.ran: list[list[str]] = []
        self.typed: list[str | None] = []

    def __call__(self, arguments, text):
        self.ran.append(list(arguments))
        self.typed.append(text)
        return self.users if arguments[0] == "list_users" else ""


def test_a_new_users_password_is_not_on_the_command_line():
    ctl = Ctl()
    mine = permissions.worker_permissions(Topology("f"), "w")
    password = permissions.apply(mine, "/", ctl)
    assert ctl.ran == [["list_users", "--silent"], ["add_user", "w"], *mine.commands("/")]
    assert len(password) >= 24
    assert ctl.typed[1] == f"{password}\n"
    assert not any(password in word for words in ctl.ran for word in words)


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_user_without_permissions_is_deleted(exists):
    class WithoutVhost(Ctl):
        def __call__(self, arguments, text):
            done = super().__call__(arguments, text)
            if arguments[0] == "set_permissions":
                raise BrokerError("no such vhost")
            return done

    ctl = WithoutVhost("w\t[]\n" if exists else "")
    with pytest.raises(BrokerError, match="no such vhost"):
        permissions.apply(permissions.worker_permissions(Topology("f"), "w"), "v", ctl)
    assert (["delete_user", "w"] in ctl.ran) == (not exists)


def test_an_existing_user_gets_no_permissions_without_the_topic_permissions():
    class WithoutExchange(Ctl):
        def __call__(self, arguments, text):
            done = super().__call__(arguments, text)
            if arguments[0] == "set_topic_permissions":
                raise BrokerError("Exchange f.results does not exist")
            return done

    ctl = WithoutExchange("w\t[]\n")
    with pytest.raises(BrokerError, match="does not exist"):
        permissions.apply(permissions.worker_permissions(Topology("f"), "w"), "v", ctl)
    assert "set_permissions" not in [words[0] for words in ctl.ran]


def test_an_existing_user_keeps_its_password():
    ctl = Ctl("w\t[]\n")
    mine = permissions.worker_permissions(Topology("f"), "w")
    assert permissions.apply(mine, "v", ctl) is None
    assert ctl.ran[1:] == mine.commands("v")
    assert all(words[1:3] == ["--vhost", "v"] for words in ctl.ran[1:])


def test_printed_commands_are_quoted_for_a_shell():
    mine = permissions.worker_permissions(Topology("f"), "w")
    script = "\n".join(permissions.shell_lines(mine, "/"))
    lines = script.replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert commands == [["rabbitmqctl", *one] for one in (["add_user", "w"], *mine.commands("/"))]


@pytest.mark.parametrize("queue_type", TYPES)
def test_printed_commands_fit_a_terminal(queue_type):
    names = Topology("letters", queue_type)
    its, mine = (
        permissions.coordinator_permissions(names, "chief"),
        permissions.worker_permissions(names, "hospital-7"),
    )
    lines = permissions.shell_lines(its, "/") + permissions.shell_lines(mine, "/")
    # The lock of a quorum queue repeats its name, so this may be longer.
    assert max(map(len, lines)) <= (80 if queue_type == "classic" else 120)


def test_an_error_of_rabbitmqctl_is_reported():
    run = permissions.runner(["sh", "-c", "echo 'no such vhost' >&2; exit 64", "sh"])
    with pytest.raises(BrokerError, match="set_permissions failed: no such vhost"):
        run(["set_permissions"], None)
    run = permissions.runner(
        ["sh", "-c", "echo 'Exchange f.results does not exist'; exit 69", "sh"]
    )
    with pytest.raises(BrokerError, match="does not exist; start the coordinator first"):
        run(["set_topic_permissions"], None)
    with pytest.raises(BrokerError, match="cannot run"):
        permissions.runner(["/nowhere/rabbitmqctl"])(["list_users"], None)
