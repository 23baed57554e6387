"""The permission patterns of workers and the coordinator, and the commands that grant them."""

from __future__ import annotations

import re
import subprocess

import pytest

from fluffle_broker.node import permissions
from fluffle_common.protocol.topology import Exchange, Queue, Topology, locks_of

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
    for lock in locks_of(names.inbox("site.7")):
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


@pytest.mark.parametrize("failing", ["nothing", "add_user", "set_topic_permissions"])
def test_printed_commands_are_quoted_and_stop_at_the_first_failure(failing):
    mine = permissions.worker_permissions(Topology("f"), "w")
    fake = f'rabbitmqctl() {{ printf "%s\\n" "$@"; echo; test "$1" != {failing}; }}\n'
    script = fake + "\n".join(permissions.shell_lines(mine, "/my vhost"))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    ran = [one.splitlines() for one in done.stdout.removesuffix("\n\n").split("\n\n")]
    commands = [["add_user", "w"], *mine.commands("/my vhost")]
    until = [words[0] for words in commands].index(failing) + 1 if done.returncode else None
    assert ran == commands[:until]
    assert bool(done.returncode) == (failing != "nothing")
