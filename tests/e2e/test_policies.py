"""Policies that limit queues on a real broker."""

from __future__ import annotations

import shlex
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from fluffle_broker.node import policies
from fluffle_broker.node.node import NodeInfo
from fluffle_common.protocol import topology
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.base import Properties, QueueFull
from fluffle_common.transport.rabbitmq import management
from fluffle_common.transport.rabbitmq.management import Management
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from tests.e2e.manage import add_vhost, manage
from tests.e2e.programs import FLUFFLE, PATIENCE_S, Federation, Program

pytestmark = pytest.mark.rabbit


class Elsewhere:
    """A vhost without policies, as on someone else's broker."""

    def __init__(self, info: NodeInfo) -> None:
        self.info, self.vhost = info, f"else-{uuid.uuid4().hex[:8]}"
        self.url = f"{info.url}{self.vhost}"
        add_vhost(info, self.vhost)
        self.api = Management(self.url, info.management_url)

    def rabbitmqctl(self, *words: str) -> str:
        ctl = str(self.info.folder / "rabbitmqctl")
        done = subprocess.run([ctl, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def elsewhere(broker_node: NodeInfo) -> Iterator[Elsewhere]:
    if broker_node.started_as == "docker":
        pytest.skip("the node's rabbitmqctl is in its container")
    made = Elsewhere(broker_node)
    yield made
    manage(broker_node, "DELETE", f"vhosts/{made.vhost}")


def run(federation: Federation, *words: object) -> Program:
    program = federation.start(FLUFFLE, *words)
    program.end()
    return program


async def declare(url: str, names: Topology) -> None:
    link = await AmqpTransport(url, "test").open()
    await link.declare([*names.shared(), *names.of_worker("w")])
    await link.close()


def wait_for_limits(api: Management, names: Topology, *, none: bool = False) -> None:
    """Wait until RabbitMQ's statistics, which are delayed, show the limits."""
    queues = [*names.shared(), *names.queues_of("w")]
    wanted = {one.name: {} if none else one.limits for one in queues if isinstance(one, Queue)}
    ends = time.monotonic() + PATIENCE_S
    while True:
        told = {one["name"]: one for one in api.ask(f"/api/queues/{api.quoted_vhost}")}
        limits = {name: told.get(name, {}).get("effective_policy_definition") for name in wanted}
        if {name: {} if one == [] else one for name, one in limits.items()} == wanted:
            return
        assert time.monotonic() < ends, limits
        time.sleep(0.2)


async def test_queues_reports_missing_policies_and_apply_policy_sets_them(
    federation: Federation, elsewhere: Elsewhere
) -> None:
    names = Topology(federation.name)
    await declare(elsewhere.url, names)
    where = ("--federation", names.federation, "--url", elsewhere.url)
    where = (*where, "--management", elsewhere.info.management_url)
    wait_for_limits(elsewhere.api, names, none=True)
    told = run(federation, "queues", *where).lines
    assert any("no policy limits how much these 7 queues may hold" in line for line in told), told
    applied = run(federation, "broker", "apply-policy", *where)
    assert applied.process.returncode == 0, applied.lines
    wait_for_limits(elsewhere.api, names)
    assert not any("no policy" in line for line in run(federation, "queues", *where).lines)


async def test_rabbitmq_describes_no_queues_of_others(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a broker with 10,000 queues, it would need longer than the timeout.
    own = Topology("letters")
    for names in (own, Topology("letters-2"), Topology("LETTERS")):
        await declare(elsewhere.url, names)
    described: list[str] = []
    original = Management.ask

    def ask(api: Management, path: str) -> Any:
        answer = original(api, path)
        described.extend(one["name"] for one in answer["items"])
        return answer

    monkeypatch.setattr(Management, "ask", ask)
    monkeypatch.setattr(management, "_PAGE_SIZE", 2)
    api = elsewhere.api
    queues = [one for one in (*own.shared(), *own.of_worker("w")) if isinstance(one, Queue)]
    assert [one.name for one in api.queue_figures(own)] == sorted(one.name for one in queues)
    assert sorted(described) == sorted(one.name for one in queues)


async def test_the_printed_commands_set_the_same_policies(
    federation: Federation, elsewhere: Elsewhere
) -> None:
    names = Topology(federation.name)
    await declare(elsewhere.url, names)
    where = ("--federation", names.federation, "--url", elsewhere.url)
    wanted = topology.policies(names.federation)
    lines = run(federation, "broker", "apply-policy", "--print", *where).lines
    assert lines == policies.shell_lines(wanted, elsewhere.vhost)
    # rabbitmqctl takes seconds for each command, and these three have all kinds of limits.
    some = {f"fluffle.{names.federation}.{kind}" for kind in ("rejected", "journal", "outbox")}
    for words in map(shlex.split, lines):
        if words[-3] in some:
            elsewhere.rabbitmqctl(*words[1:])
    already = elsewhere.api.ask(f"/api/policies/{elsewhere.vhost}")
    assert {one["name"] for one in already} == some
    policies.apply(wanted, elsewhere.api, keep=True)
    wait_for_limits(elsewhere.api, names)


async def test_a_changed_limit_applies_at_once(
    federation: Federation, elsewhere: Elsewhere
) -> None:
    names = Topology(federation.name)
    await declare(elsewhere.url, names)
    link = await AmqpTransport(elsewhere.url, "test").open()

    async def publish() -> None:
        await link.publish(b"x", Properties(), exchange=names.results, keys=["update.w"])

    (policy,) = (one for one in topology.policies(names.federation) if "updates" in one.name)
    small = {**policy.definition, "max-length": 1}
    value = {"pattern": policy.pattern, "definition": small, "priority": 1, "apply-to": "queues"}
    elsewhere.api.ask(f"/api/policies/{elsewhere.vhost}/{policy.name}", put=value)
    await publish()
    with pytest.raises(QueueFull):
        await publish()
    await link.declare(names.shared())  # still the same arguments
    await link.close()


async def test_a_private_node_limits_every_federation(
    federation: Federation, broker_node: NodeInfo
) -> None:
    names = Topology(federation.name)
    await declare(broker_node.url, names)
    api = Management(broker_node.url, broker_node.management_url)
    wait_for_limits(api, names)


def test_a_queue_of_an_earlier_version_is_named_with_the_remedy(
    federation: Federation, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(elsewhere.url))
    old = {"x-queue-type": "classic", "x-max-length": 1000, "x-overflow": "drop-head"}
    queue = f"{federation.name}.unrouted"
    connection.channel().queue_declare(queue, durable=True, arguments=old)
    connection.close()
    where = ("--federation", federation.name, "--url", elsewhere.url, "--run", tmp_path / "run")
    program = run(federation, "coordinator", *where)
    assert program.process.returncode == 3, program.lines
    assert f"rabbitmqctl delete_queue {queue}" in program.lines[-1]
    assert "another version" in program.lines[-1]
